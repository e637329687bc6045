"""The report: what it shows of finished and unfinished runs, that it is one safe file, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report as report_module
import torch
from report import write_report
from report_content import Memory, read_run
from report_figures import data_uri, line_chart, nice_ticks
from results import wilson_interval

import ait

SCRIPT = Path(report_module.__file__)
ARGUMENTS = {"img_size": (8, 8), "patch_size": 4, "in_chans": 3, "depth": 1, "embed_dim": 16, "head_dim": 8}
WORKSPACE = {"num_slots": 4, "slot_dim": 4, "workspace_heads": 2, "top_k": 3}
HOSTILE = '<script>alert("x")</script>&\'"><img src=http://evil.example/a.png>'
VOID = {"meta", "img", "br", "link", "input"}


class _Page(HTMLParser):
    """Tags and attributes of a page; a tag that is closed wrongly raises."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _check_self_contained(page: str) -> None:
    """No scripts, no handlers, and nothing that is loaded from elsewhere."""
    for tag, attributes in _Page(page).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
        assert not [name for name in attributes if name.startswith("on") or name in {"href", "srcset", "xlink:href"}]
        if "src" in attributes:
            assert tag == "img" and str(attributes["src"]).startswith("data:image/png;base64,")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def _line(epoch: int, **changes: float) -> dict[str, float]:
    line = {
        "epoch": epoch,
        "lr": 1e-3 / epoch,
        "train_loss": 2.0 / epoch,
        "train_accuracy": 0.3 + 0.1 * epoch,
        "balance_loss": 0.5 / epoch,
        "validation_loss": 1.8 / epoch,
        "validation_accuracy": 0.35 + 0.1 * epoch,
        "images_per_second": 200.0 + epoch,
        "seconds": 60.0 * epoch,
    }
    return line | changes


def _confusion(classes: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 4, (classes, classes)) + 20 * np.eye(classes, dtype=np.int64)


def _mistakes(classes: list[str], **changes: np.ndarray) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {
        "images": generator.integers(0, 256, (3, 3, 8, 8), dtype=np.uint8),
        "labels": np.array([0, 1, 0]),
        "predictions": np.array([1, 0, 1]),
        "probabilities": np.array([0.991, 0.9, 0.7]),
        "classes": np.array(classes),
        "split": np.array("validation"),
        "confusion": _confusion(len(classes)),
    }
    return arrays | changes


def make_run(
    folder: Path, finished: bool = True, model: str = "ait_tiny", classes: int = 3, names: list[str] | None = None
) -> Path:
    """A run's folder as train.py leaves it: two of three epochs, or all of them and a result."""
    folder.mkdir()
    names = names or [f"class {index}" for index in range(classes)]
    config = {"model": model, "data": "cifar10", "epochs": 3, "options": ["depth=1"], "seed": 0, "init_from": None}
    (folder / "config.json").write_text(json.dumps(config))
    environment = {"ait": "0.1.0", "torch": {"running": "2.10"}, "cpu": "a processor", "git_revision": "abc123"}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [_line(epoch) for epoch in range(1, 4 if finished else 3)]
    if model.startswith("vit"):
        lines = [line | {"balance_loss": 0.0} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ARGUMENTS | {"num_classes": classes} | (WORKSPACE if model.startswith("ait") else {})
    content = {"model": model, "model_arguments": arguments, "config": config, "epoch": len(lines)}
    content["state_dict"] = ait.create_model(model, **arguments).state_dict()
    torch.save(content, folder / "checkpoint.pt")
    np.savez_compressed(folder / "mistakes.npz", **_mistakes(names))
    if finished:
        (folder / "result.json").write_text(json.dumps(_result(classes, model=model)))
    return folder


def _result(classes: int = 3, **changes: Any) -> dict[str, Any]:
    confusion = _confusion(classes)
    correct, total = int(confusion.diagonal().sum()), int(confusion.sum())
    result = {
        "run": "run",
        "model": "ait_tiny",
        "data": "cifar10",
        "test_accuracy": correct / total,
        "test_interval_95": wilson_interval(correct, total),
        "validation_accuracy": 0.65,
        "kept_epoch": 3,
        "epochs": 3,
        "parameters": 12345,
        "images_per_second": 202.0,
        "seconds": 7260.0,
        "git_revision": "abc123",
        "environment": {"cpu": "a processor", "threads": 1},
        "confusion": confusion.tolist(),
    }
    return result | changes


def _page(run: Path) -> str:
    page = write_report(run).read_text(encoding="utf-8")
    _check_self_contained(page)
    return page


def test_finished_run(tmp_path: Path) -> None:
    page = _page(make_run(tmp_path / "run"))
    result = _result()
    low, high = result["test_interval_95"]
    assert "finished: 3 epochs" in page and "not finished" not in page
    assert f"{100 * result['test_accuracy']:.2f} %" in page
    assert f"95 % interval {100 * low:.2f} to {100 * high:.2f}" in page
    assert "12,345" in page and "2 h 1 min" in page and "abc123" in page and "a processor" in page
    for title in ("Loss", "Accuracy", "Balance loss", "Learning rate", "Training images/s"):
        assert f"<b>{title}" in page
    assert "Confusions on the test split" in page and "Worst mistakes on the validation split" in page
    assert "answered as class 1" in page and "99.1&nbsp;%" in page
    assert "effective slots" in page and "4 &times; 4" in page and "memory: 16 entries" in page
    assert 'class="notes"' not in page


def test_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    page = _page(run)
    assert "not finished: 2 of 3 epochs so far" in page and "about 60 s to go, if it goes on" in page
    assert "validation accuracy so far" in page and "55.00 %" in page and "epoch 2, the best" in page
    model = ait.create_model("ait_tiny", **ARGUMENTS, **WORKSPACE, num_classes=3)
    assert f"{ait.count_parameters(model).parameters:,}" in page
    assert "Confusions on the validation split" in page and "abc123" in page
    assert "test accuracy" not in page


def test_run_before_its_first_epoch_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "checkpoint.pt", "mistakes.npz", "environment.json"):
        (run / name).unlink()
    page = _page(run)
    assert "0 of 3 epochs so far" in page and "No epoch has been recorded" in page


def test_half_written_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + json.dumps(_line(3))[:40])
    page = _page(run)
    assert "2 of 3 epochs" in page and "half written" in page
    # Whole, with nothing but the newline missing.
    (run / "metrics.jsonl").write_text(text + json.dumps(_line(3)))
    page = _page(run)
    assert "3 of 3 epochs" in page and "half written" not in page


def test_old_folder_without_environment_and_mistakes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "environment.json").unlink()
    (run / "mistakes.npz").unlink()
    page = _page(run)
    assert "abc123" in page and "a processor" in page
    assert "Worst mistakes" not in page and "Confusions on the test split" in page
    assert 'class="notes"' not in page


def test_vit_has_no_memory_and_no_balance_loss(tmp_path: Path) -> None:
    page = _page(make_run(tmp_path / "run", model="vit_tiny"))
    assert "no memory to show" in page and "effective slots" not in page and "<b>Balance loss" not in page


def test_a_hundred_classes_are_an_image_and_a_list(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=100)
    confusion = _confusion(100)
    confusion[7, 99] = 200
    (run / "result.json").write_text(json.dumps(_result(confusion=confusion.tolist())))
    page = _page(run)
    assert 'alt="confusion matrix of 100 classes"' in page and '<svg class="confusion"' not in page
    assert '<td>class 7</td><td>class 99</td><td class="number">200</td>' in page
    assert len(page) < 300_000


@pytest.mark.parametrize("finished", [True, False])
def test_hostile_names_are_shown_as_text(tmp_path: Path, finished: bool) -> None:
    run = make_run(tmp_path / "<b>run", finished, names=[HOSTILE, "b", "c"])
    config = json.loads((run / "config.json").read_text())
    config |= {"data": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}], "lone": "\ud800"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "git_revision": HOSTILE}))
    arrays = _mistakes([HOSTILE, "b", "c"], captions=np.array([HOSTILE] * 3), split=np.array(HOSTILE))
    np.savez_compressed(run / "mistakes.npz", **arrays)
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["state_dict"][HOSTILE + ".memory.gamma"] = torch.eye(3)
    torch.save(checkpoint, run / "checkpoint.pt")
    if finished:
        kind = {"correct": 1, "total": 2, "accuracy": 0.5, "interval_95": [0.1, 0.9]}
        (run / "result.json").write_text(json.dumps(_result(test_by_kind={HOSTILE: kind})))
    page = _page(run)
    assert "<script" not in page and "<b>run" not in page and "&lt;script&gt;" in page


def test_questions_by_kind_and_their_captions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    kind = {"correct": 61, "total": 100, "accuracy": 0.61, "interval_95": list(wilson_interval(61, 100))}
    kinds = {"binary": kind | {"majority_accuracy": 0.33, "question_only_accuracy": 0.44}, "ternary": kind}
    (run / "result.json").write_text(json.dumps(_result(test_by_kind=kinds)))
    np.savez_compressed(run / "mistakes.npz", **_mistakes(["a", "b", "c"], captions=np.array(["Is it red?"] * 3)))
    page = _page(run)
    assert page.count("61 of 100") == 2 and "33.00 %" in page and "44.00 %" in page and "Is it red?" in page


def test_other_shapes_of_mistakes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    grey = np.zeros((3, 1, 5, 7), np.uint8)
    np.savez_compressed(run / "mistakes.npz", **_mistakes(["a", "b", "c"], images=grey))
    assert _page(run).count('alt="a, answered as b"') == 2
    none = {"images": grey[:0], "labels": np.zeros(0, np.int64), "predictions": np.zeros(0, np.int64)}
    none |= {"probabilities": np.zeros(0), "confusion": np.diag([3, 0, 2])}
    np.savez_compressed(run / "mistakes.npz", **_mistakes(["a", "b", "c"], **none))
    assert "No mistakes." in _page(run)


def test_classes_of_another_number_go_by_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    np.savez_compressed(run / "mistakes.npz", **_mistakes(["a", "b"]))
    assert "names 2 classes and result.json has 3" in _page(run)


def test_values_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    lines = [_line(1, validation_loss=math.nan), _line(2, validation_loss=math.inf), _line(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = _page(run)
    assert "nan," not in page and 'points="nan' not in page and "<b>Loss" in page


def _break_archive(path: Path) -> None:
    np.savez_compressed(path, **_mistakes(["a", "b", "c"]) | {"labels": np.array([0, 1, 9])})


def _object_archive(path: Path) -> None:
    np.savez_compressed(path, **_mistakes(["a", "b", "c"]) | {"classes": np.array(["a", None, {}], dtype=object)})


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "other": lambda path: path.write_bytes(b"PK\x03\x04 something else"),
    "text": lambda path: path.write_text("not this"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "altered": lambda path: path.write_bytes(path.read_bytes().replace(b"\x00\x00", b"\x01\x07")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["checkpoint.pt", "mistakes.npz", "environment.json"])
def test_a_damaged_extra_file_is_named_and_the_rest_is_shown(tmp_path: Path, name: str, damage: str) -> None:
    run = make_run(tmp_path / "run")
    before = (run / name).read_bytes()
    DAMAGES[damage](run / name)
    page = _page(run)
    assert "finished: 3 epochs" in page and "<b>Accuracy" in page
    if (run / name).is_dir() or (run / name).read_bytes() != before:
        assert f"{name} is damaged" in page
    shown = {"checkpoint.pt": "effective slots", "mistakes.npz": "Worst mistakes", "environment.json": "cpu"}
    assert all(text in page for other, text in shown.items() if other != name)


@pytest.mark.parametrize("write", [_break_archive, _object_archive])
def test_mistakes_that_do_not_fit_are_named(tmp_path: Path, write: Any) -> None:
    run = make_run(tmp_path / "run")
    write(run / "mistakes.npz")
    page = _page(run)
    assert "mistakes.npz is damaged" in page and "Worst mistakes" not in page


@pytest.mark.parametrize("gamma", [torch.zeros(0, 4), torch.full((2, 2), math.nan), torch.ones(3), "text"])
def test_a_memory_that_cannot_be_shown_is_named(tmp_path: Path, gamma: Any) -> None:
    run = make_run(tmp_path / "run")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["state_dict"]["odd.memory.gamma"] = gamma
    torch.save(checkpoint, run / "checkpoint.pt")
    page = _page(run)
    assert "odd.memory.gamma is not shown" in page and "effective slots" in page


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("config.json", "{", "config.json to hold a JSON object"),
        ("config.json", "[1]", "config.json to hold a JSON object, got list"),
        ("config.json", "[" * 100_000, "config.json to hold a JSON object"),
        ("config.json", '{"model": 3, "data": "cifar10", "epochs": 1}', "config.json to name the model"),
        ("config.json", '{"model": "a", "data": "b", "epochs": 0}', "config.json to have epochs"),
        ("metrics.jsonl", "garbage", "metrics.jsonl, line 1, to be a JSON object"),
        ("metrics.jsonl", '{"epoch": 1\n{"epoch": 2}\n', "metrics.jsonl, line 1, to be a JSON object"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1, to be a JSON object"),
        ("metrics.jsonl", '{"epoch": 1}\n', "metrics.jsonl, line 1, to have numbers for balance_loss"),
        ("metrics.jsonl", json.dumps(_line(1) | {"epoch": 1.5}) + "\n", "line 1, to be of an epoch"),
        ("metrics.jsonl", json.dumps(_line(1) | {"lr": "x"}) + "\n", "line 1, to have numbers for lr"),
        ("result.json", '{"run": ', "result.json: expected the result.json of a run"),
        ("result.json", "{}", "result.json: expected the result.json of a run"),
        ("result.json", json.dumps(_result(test_accuracy="high")), "result.json to have a number for test_accuracy"),
        ("result.json", json.dumps(_result(test_interval_95=[1])), "result.json to have two numbers"),
        ("result.json", json.dumps(_result(environment=[])), "result.json to have an object for environment"),
        ("result.json", json.dumps(_result(confusion=[[1, 2], [3]])), "result.json to have a square of counts"),
        ("result.json", json.dumps(_result(confusion=[[1, -2], [3, 4]])), "result.json to have a square of counts"),
        ("result.json", json.dumps(_result(confusion=[[0.5]])), "result.json to have a square of counts"),
        ("result.json", json.dumps(_result(test_by_kind={"a": {}})), "interval_95 for 'a' of test_by_kind"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, text: str, expected: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(expected)):
        write_report(run)
    assert not (run / "report.html").exists()


def test_missing_folder_config_and_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder of a run, got .*nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        write_report(tmp_path / "empty")
    run = make_run(tmp_path / "run")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        write_report(run, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(run, tmp_path / "nowhere" / "report.html")


def test_the_report_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    out = tmp_path / "page.html"
    out.write_text("old")
    assert write_report(run, out) == out and out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {path.name for path in run.iterdir()} == before
    assert write_report(run) == run / "report.html"
    assert {path.name for path in run.iterdir()} == before | {"report.html"}
    assert write_report(run).read_bytes() == out.read_bytes()


def test_a_report_in_the_middle_of_a_run_changes_no_random_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    before = torch.get_rng_state()
    write_report(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_effective_slots() -> None:
    assert Memory("a", np.eye(5), 0).effective_slots == pytest.approx(5)
    assert Memory("a", np.ones((5, 3)), 0).effective_slots == pytest.approx(1)
    assert Memory("a", np.zeros((2, 2)), 0).effective_slots == pytest.approx(1)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert Memory("a", np.diag([3.0, 1.0]), 0).effective_slots == pytest.approx(expected)
    assert Memory("a", np.diag([3.0, 0.0]), 0).cosines.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_the_images(channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    prefix, _, content = data_uri(pixels).partition(",")
    assert prefix == "data:image/png;base64"
    read = np.asarray(image.open(io.BytesIO(base64.b64decode(content))))
    assert np.array_equal(read.reshape(pixels.shape), pixels)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.74), (1e-5, 1e-3), (5, 5), (0, 0), (-3, 900), (1e8, 3e8)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_a_chart_without_finite_values_is_left_out() -> None:
    assert line_chart("nothing", []) == ""


def test_kept_epoch_is_the_last_of_the_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    lines = [_line(1, validation_accuracy=0.5), _line(2, validation_accuracy=0.5), _line(3, validation_accuracy=0.4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(run).kept_epoch == 2


def test_command_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, str(SCRIPT), str(run), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "page.html") and (tmp_path / "page.html").is_file()
    (run / "config.json").unlink()
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: report: expected a run's config.json")
    assert "Traceback" not in failed.stderr


def test_a_real_run_writes_its_report(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from tests.experiments.tiny import run_quietly, tiny_config, write_tiny_cifar

    config = tiny_config(write_tiny_cifar(tmp_path / "data"), tmp_path / "run", report=True)
    run_quietly(config)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    _check_self_contained(page)
    assert "finished: 2 epochs" in page and "Worst mistakes on the test split" in page and "effective slots" in page
    assert 'class="notes"' not in page
    for title in FIGURES:
        assert f"<h3>{title}</h3>" in page and f'alt="{title.lower()}" src="data:image/png;base64,' in page
    assert "row perplexity" in page and "<td>blocks.0.mlp.workspace</td>" in page
    _check_damaged_recordings(tmp_path / "run")


FIGURES = (
    "Patches that slots attend",
    "Retrieval map",
    "Slot use",
    "Energy descent",
    "Rollout",
    "Memory over training",
)


def _check_damaged_recordings(run: Path) -> None:
    """Each is named, and all the rest is shown."""
    for name, damage, gone in (("recording.npz", "cut", FIGURES[:5]), ("memory.npz", "text", FIGURES[5:])):
        before = (run / name).read_bytes()
        DAMAGES[damage](run / name)
        page = _page(run)
        assert f"{name} is damaged" in page
        for title in FIGURES:
            assert (f"<h3>{title}</h3>" in page) == (title not in gone), (damage, title)
        (run / name).write_bytes(before)
    # A recording of something else: whole, and of no use.
    trace = ait.Trace.load(run / "recording.npz")
    trace[0].inputs = None
    trace.save(run / "recording.npz")
    page = _page(run)
    assert "recording.npz is not shown: it holds no images of its own" in page and "<h3>Memory over" in page
    trace.passes = []
    trace.save(run / "recording.npz")
    assert "recording.npz is not shown: record: expected a forward pass" in _page(run)
    (run / "recording.npz").unlink()
    assert "Inside the workspaces" in _page(run)
    (run / "memory.npz").unlink()
    assert "Inside the workspaces" not in _page(run)
