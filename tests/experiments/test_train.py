"""The training script: what it records, that it repeats, and what it refuses before any work."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

import train as train_module
from run_folder import digest, load_checkpoint
from train import RECIPES, Config, Schedule, check, resolve

import ait
from ait.data import list_images
from tests.experiments.tiny import TINY_MODEL, run_quietly, tiny_config

pytestmark = pytest.mark.usefixtures("threads")

SCRIPT = Path(train_module.__file__)


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of a finished run of ait_tiny."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run_quietly(tiny_config(data_dir, out))


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_records_one_line_an_epoch_and_its_result(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    lines = _lines(out)
    assert [line["epoch"] for line in lines] == [1, 2]
    expected = {"epoch", "lr", "train_loss", "train_accuracy", "balance_loss", "validation_loss", "validation_accuracy"}
    assert all(line.keys() == expected | {"images_per_second", "seconds"} for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["balance_loss"] > 0
    assert lines[-1]["lr"] == pytest.approx(1e-3 * 0.01)
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert (result["run"], result["model"], result["data"], result["test_images"]) == (
        "finished",
        "ait_tiny",
        "cifar10",
        20,
    )
    assert result["test_accuracy"] == result["test_correct"] / 20
    low, high = result["test_interval_95"]
    assert 0 <= low <= result["test_accuracy"] <= high <= 1
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum(1).tolist() == [2] * 10 and int(confusion.diagonal().sum()) == result["test_correct"]
    assert result["validation_accuracy"] == max(line["validation_accuracy"] for line in lines)
    assert result["environment"]["torch"]["running"] == torch.__version__ and result["environment"]["cpu"]
    assert result["seconds"] > 0 and result["images_per_second"] > 0


def test_the_revision_is_that_of_the_start(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ["at the start"]
    monkeypatch.setattr(train_module, "git_revision", lambda: head[0])
    real = train_module.prepare_folder

    def prepare_folder(folder: Path) -> None:
        head[0] = "later"
        real(folder)

    monkeypatch.setattr(train_module, "prepare_folder", prepare_folder)
    assert run_quietly(tiny_config(data_dir, tmp_path, "vit_tiny", epochs=1))["git_revision"] == "at the start"


def test_no_path_of_this_machine_is_recorded(finished: tuple[Path, dict[str, Any]], data_dir: Path) -> None:
    out, _ = finished
    for name in ("config.json", "metrics.jsonl", "result.json"):
        text = (out / name).read_text()
        assert str(out.parent) not in text and str(data_dir.parent) not in text
    assert json.loads((out / "config.json").read_text())["data_dir"] == "tiny"


def test_the_checkpoint_makes_the_tested_model_again(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == result["kept_epoch"] and checkpoint["config"]["seed"] == 0
    model = ait.create_model(checkpoint["model"], **checkpoint["model_arguments"])
    model.load_state_dict(checkpoint["state_dict"])
    assert ait.count_parameters(model).parameters == result["parameters"]
    assert not list(out.glob("*.tmp"))


def test_tensorboard_gets_every_metric(finished: tuple[Path, dict[str, Any]]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, _ = finished
    events = accumulator.EventAccumulator(str(out))
    events.Reload()
    inside = {name for name in events.Tags()["scalars"] if name.startswith("workspace/")}
    assert set(events.Tags()["scalars"]) - inside == _lines(out)[0].keys()
    losses = [event.value for event in events.Scalars("train_loss")]
    assert losses == pytest.approx([line["train_loss"] for line in _lines(out)], rel=1e-6)


def test_what_the_workspaces_did_is_kept_and_reaches_tensorboard(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    trace, history = ait.Trace.load(out / "recording.npz"), ait.MemoryHistory.load(out / "memory.npz")
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    (name,) = trace.layer_names
    kept = checkpoint["state_dict"][f"{name}.memory.gamma"]
    # Rows are normalised when read, which may change the last bit of a row of norm 1.
    torch.testing.assert_close(trace.layer(0).memory_before, kept, rtol=0, atol=2e-7)
    assert history.steps == list(range(result["epochs"] + 1))
    assert torch.equal(history.memory(0)[checkpoint["epoch"]], trace.layer(0).memory_before)
    assert float(history.distance(0)[1].min()) > 1e-4
    assert trace[0].inputs is not None and trace[0].inputs.dtype == torch.uint8
    write = trace.layer(0).write
    assert write is not None and not write.kept and len(trace[0].attention) == 1

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out))
    events.Reload()
    for quantity, value in ait.recording.scalars(trace.layer(0)).items():
        logged = {event.step: event.value for event in events.Scalars(f"workspace/{name}/{quantity}")}
        assert list(logged) == history.steps[1:] and logged[checkpoint["epoch"]] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_looking_inside_changes_no_weight_and_no_random_number(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, semantics: str
) -> None:
    config = tiny_config(data_dir, tmp_path / "with")
    config = dataclasses.replace(config, options=(*config.options, f"semantics={semantics}"))
    run_quietly(config)
    monkeypatch.setattr(train_module.LookInside, "record", lambda *_, **__: {})
    run_quietly(dataclasses.replace(config, out=tmp_path / "without"))
    first, second = (load_checkpoint(tmp_path / name / "last.pt") for name in ("with", "without"))
    for part in ("state_dict", "optimizer", "random", "generator"):
        assert digest(first[part]) == digest(second[part]), part


def test_without_tensorboard_it_says_so_and_runs(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run_quietly(tiny_config(data_dir, tmp_path, "vit_tiny", epochs=1))
    assert 'pip install "associative-transformer[train]"' in capsys.readouterr().err
    assert not list(tmp_path.glob("events*"))


MEASURED_BY_THE_CLOCK = ("images_per_second", "seconds")


@pytest.mark.parametrize("model", ["ait_tiny", "vit_tiny"])
def test_the_same_seed_gives_the_same_numbers_and_another_others(data_dir: Path, tmp_path: Path, model: str) -> None:
    outs = {"first": 3, "second": 3, "other": 4}
    for name, seed in outs.items():
        run_quietly(tiny_config(data_dir, tmp_path / name, model, seed=seed, epochs=1))
    lines = {name: _lines(tmp_path / name)[0] for name in outs}
    for line in lines.values():
        for key in MEASURED_BY_THE_CLOCK:
            del line[key]
    assert lines["first"] == lines["second"] != lines["other"]
    weights = [load_checkpoint(tmp_path / name / "checkpoint.pt")["state_dict"] for name in ("first", "second")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_vit_learns_a_colour_in_a_few_steps(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop as a whole: reddish and bluish images are told apart, among images never trained on."""
    real = train_module.load_images

    def coloured(*arguments: Any, **options: Any) -> Any:
        splits = real(*arguments, **options)
        for part in (splits.train, splits.validation, splits.test):
            part.labels %= 2
            part.images //= 4
            part.images[part.labels == 0, 0] += 128
            part.images[part.labels == 1, 2] += 128
        return splits

    monkeypatch.setattr(train_module, "load_images", coloured)
    result = run_quietly(tiny_config(data_dir, tmp_path, "vit_tiny", epochs=15, lr=1e-2))
    assert result["test_accuracy"] == 1.0
    assert _lines(tmp_path)[-1]["train_loss"] < 0.5 * _lines(tmp_path)[0]["train_loss"]


def test_the_kept_weights_are_those_of_the_best_validation_accuracy(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs, of which validation likes the second best: its weights are in the checkpoint and are tested."""
    real, seen = train_module.evaluate, []

    def evaluate(model: torch.nn.Module, data: Any, splits: Any, config: Config) -> tuple[float, torch.Tensor]:
        loss, _ = real(model, data, splits, config)
        seen.append((data.name, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        right = {1: 0, 2: 3, 3: 2}.get(len(seen), 0)  # of 4 validation images
        wrong = (data.labels + 1) % 10
        return loss, torch.nn.functional.one_hot(torch.cat([data.labels[:right], wrong[right:]]), 10).float()

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    result = run_quietly(tiny_config(data_dir, tmp_path, epochs=3))
    assert (result["kept_epoch"], result["validation_accuracy"]) == (2, 0.75)
    assert [name for name, _ in seen] == ["cifar10 validation"] * 3 + ["cifar10 test"]
    kept, tested = seen[1][1], seen[3][1]
    assert all(torch.equal(kept[name], tested[name]) for name in kept)
    assert any(not torch.equal(seen[2][1][name], kept[name]) for name in kept)


def test_schedule_rises_in_a_line_and_falls_by_half_a_cosine() -> None:
    schedule = Schedule(steps=101, warmup_steps=20, peak=2.0, final_ratio=0.1)
    assert [schedule(step) for step in (0, 9, 19, 20)] == pytest.approx([0.1, 1.0, 2.0, 2.0])
    assert schedule(60) == pytest.approx(1.1) and schedule(100) == pytest.approx(0.2)
    assert all(schedule(step) > schedule(step + 1) for step in range(20, 100))
    assert Schedule(1, 0, 2.0, 0.1)(0) == 2.0 and Schedule(3, 3, 3.0, 0.0)(2) == 3.0


def test_matrices_decay_and_nothing_else_does() -> None:
    model = ait.create_model("ait_tiny")
    decayed, kept = train_module.parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() < 2 for parameter in kept["params"])
    count = sum(parameter.numel() for group in (decayed, kept) for parameter in group["params"])
    assert count == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_starting_from_a_checkpoint_takes_its_weights(
    finished: tuple[Path, dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    out, _ = finished
    config = tiny_config(data_dir, tmp_path / "next", init_from=out / "checkpoint.pt")
    model, _ = train_module.make_model(config, train_module.load_images("cifar10", data_dir))
    theirs = load_checkpoint(out / "checkpoint.pt")["state_dict"]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_a_replaced_run_leaves_nothing_of_itself_and_other_files_stay(data_dir: Path, tmp_path: Path) -> None:
    run_quietly(tiny_config(data_dir, tmp_path, "vit_tiny", epochs=2))
    (tmp_path / "notes.txt").write_text("mine")
    run_quietly(tiny_config(data_dir, tmp_path, "vit_tiny", epochs=1, overwrite=True))
    assert len(_lines(tmp_path)) == 1 and len(list(tmp_path.glob("events*"))) <= 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_every_data_set_has_a_recipe_and_a_given_option_overrides_it() -> None:
    assert RECIPES.keys() == set(list_images())
    config = resolve(Config(data="digits", lr=0.5))
    assert (config.lr, config.patch_size, str(config.out)) == (0.5, 2, os.path.join("runs", "digits-ait_tiny-0"))
    assert resolve(Config(data="digits", epochs=1)).warmup_epochs == 1
    for name in RECIPES:
        check(resolve(Config(data=name, out=Path("runs") / "never-made")))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": "resnet"}, ValueError, "expected model to be one of ait_base, .* got 'resnet'"),
    "data": ({"data": "mnist"}, ValueError, "expected data to be one of cifar10, cifar100, digits, .* got 'mnist'"),
    "no data_dir": ({"data_dir": None}, FileNotFoundError, "cifar10: expected a data directory, got none. To get it"),
    "missing data": (
        {"data_dir": Path("nowhere")},
        FileNotFoundError,
        "expected nowhere to hold .* got no such folder. To get it",
    ),
    "lr NaN": ({"lr": math.nan}, ValueError, "expected lr to be a finite number above 0, got nan"),
    "lr zero": ({"lr": 0.0}, ValueError, "expected lr to be a finite number above 0, got 0.0"),
    "lr negative": ({"lr": -1e-3}, ValueError, "expected lr to be a finite number above 0, got -0.001"),
    "lr infinite": ({"lr": math.inf}, ValueError, "expected lr to be a finite number above 0, got inf"),
    "weight decay": ({"weight_decay": -0.1}, ValueError, "expected weight_decay to be a finite number from 0"),
    "clip": ({"clip_norm": math.nan}, ValueError, "expected clip_norm to be a finite number from 0"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "expected label_smoothing .* from 0 to 1, got 1.5"),
    "warm-up": ({"warmup_epochs": 3.0}, ValueError, "expected warmup_epochs .* from 0 to 2, got 3.0"),
    "final ratio": ({"final_lr_ratio": -1.0}, ValueError, "expected final_lr_ratio .* from 0 to 1, got -1.0"),
    "epochs": ({"epochs": 0}, ValueError, "expected epochs to be a whole number of at least 1, got 0"),
    "batch size": ({"batch_size": 0}, ValueError, "expected batch_size to be a whole number of at least 1, got 0"),
    "large batch": ({"batch_size": 37}, ValueError, "a batch size of at most 36, the training images of cifar10"),
    "seed": ({"seed": -1}, ValueError, "expected seed to be a whole number of at least 0, got -1"),
    "large seed": ({"seed": 2**64}, ValueError, f"expected seed to be a whole number below 2\\^63, got {2**64}"),
    "threads": ({"threads": 0}, ValueError, "expected threads to be a whole number of at least 1, got 0"),
    "device": ({"device": "abacus"}, ValueError, "expected a device that torch has here, got 'abacus'"),
    "accumulate": ({"accumulate": 3}, ValueError, "at most 12, .* got 16 times accumulate 3"),
    "no step": ({"accumulate": 0}, ValueError, "expected accumulate to be a whole number of at least 1, got 0"),
    "minutes": ({"save_minutes": math.nan}, ValueError, "expected save_minutes to be a finite number"),
    "fresh": ({"fresh": True}, ValueError, "cifar10: expected fresh=False"),
    "size": ({"img_size": 64}, ValueError, "cifar10: expected no img_size"),
    "patch": ({"patch_size": 5}, ValueError, "patch_size"),
    "option": ({"options": ("depth",)}, ValueError, "expected options as NAME=VALUE, got 'depth'"),
    "unknown option": ({"options": ("dpeth=1",)}, TypeError, "no option 'dpeth'"),
    "checkpoint": ({"init_from": Path("nothing.pt")}, FileNotFoundError, "no checkpoint nothing.pt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_run_can_have_is_refused_before_a_folder_is_made(data_dir: Path, tmp_path: Path, case: str) -> None:
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run_quietly(tiny_config(**{"data_dir": data_dir, "out": tmp_path / "run", **changes}))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_and_unharmed(
    finished: tuple[Path, dict[str, Any]], data_dir: Path
) -> None:
    out, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(FileExistsError, match=r"expected a new or empty folder, got .*finished.* see --overwrite"):
        run_quietly(tiny_config(data_dir, out))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("place", ["file", "file/run", "file/deeper/run"])
def test_output_that_cannot_be_written_is_refused(data_dir: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="expected an output folder that can be written, got"):
        run_quietly(tiny_config(data_dir, tmp_path / place, overwrite=True))
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(
    finished: tuple[Path, dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    out, _ = finished
    path = out / "checkpoint.pt"
    with pytest.raises(
        ValueError, match=r"of the same model, got 12 differences: blocks.0.mlp.norm.weight is unknown here"
    ):
        run_quietly(tiny_config(data_dir, tmp_path / "vit", "vit_tiny", init_from=path))
    wider = (*tiny_config(data_dir, out).options, "hidden_dim=24")
    with pytest.raises(ValueError, match=r"fc1.weight is \(16, 16\) there and \(24, 16\) here"):
        run_quietly(tiny_config(data_dir, tmp_path / "wide", options=wider, init_from=path))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "list", "half"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(
    finished: tuple[Path, dict[str, Any]], data_dir: Path, tmp_path: Path, content: bytes | str
) -> None:
    path = tmp_path / "other.pt"
    if content == "list":
        torch.save([1, 2], path)
    elif content == "half":
        whole = (finished[0] / "checkpoint.pt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .*other.pt to be a checkpoint of train.py, got"):
        run_quietly(tiny_config(data_dir, tmp_path / "run", init_from=path))


def test_a_loss_that_is_not_finite_stops_at_its_step(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = train_module.F.cross_entropy, []

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(options)
        training_calls = sum("label_smoothing" in each for each in calls)
        return real(logits, labels, **options) * (math.nan if training_calls == 4 else 1)

    monkeypatch.setattr(train_module.F, "cross_entropy", cross_entropy)
    with pytest.raises(FloatingPointError, match=r"expected a finite loss, got nan .* at step 3 of 4, learning rate"):
        run_quietly(tiny_config(data_dir, tmp_path, "vit_tiny"))
    assert len(_lines(tmp_path)) == 1 and (tmp_path / "checkpoint.pt").exists()  # the first epoch is not lost


def test_mixed_precision_trains_in_bfloat16(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    real = train_module.F.cross_entropy

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.add((logits.dtype, torch.is_autocast_enabled("cpu")))
        return real(logits, labels, **options)

    def linear(*arguments: torch.Tensor) -> torch.Tensor:
        out = real_linear(*arguments)
        dtypes.add(out.dtype)
        return out

    dtypes: set[torch.dtype] = set()
    real_linear = torch.nn.functional.linear
    monkeypatch.setattr(train_module.F, "cross_entropy", cross_entropy)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    run_quietly(tiny_config(data_dir, tmp_path / "mixed", amp=True))
    assert torch.bfloat16 in dtypes and seen == {(torch.float32, False)}
    run_quietly(tiny_config(data_dir, tmp_path / "whole"))
    mixed, whole = _lines(tmp_path / "mixed"), _lines(tmp_path / "whole")
    assert mixed[-1]["train_loss"] != whole[-1]["train_loss"]
    assert mixed[-1]["train_loss"] == pytest.approx(whole[-1]["train_loss"], rel=0.02)


@pytest.mark.slow
def test_compiled_training_gives_the_numbers_of_eager_training(data_dir: Path, tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        config = tiny_config(data_dir, tmp_path / name, compile=compiled)
        options = (*config.options, "write_dropout=0.0")  # inductor draws other numbers
        run_quietly(train_module.dataclasses.replace(config, options=options))
    eager, compiled_lines = _lines(tmp_path / "eager"), _lines(tmp_path / "compiled")
    for a, b in zip(eager, compiled_lines, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["balance_loss"] == pytest.approx(a["balance_loss"], rel=1e-3)
    names = {name for name in load_checkpoint(tmp_path / "compiled" / "checkpoint.pt")["state_dict"]}
    assert names == load_checkpoint(tmp_path / "eager" / "checkpoint.pt")["state_dict"].keys()


def test_the_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    available = {"cuda": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available["mps"])
    for device, there in (("cpu", ()), ("mps", ("mps",)), ("cuda", ("mps", "cuda"))):
        available.update({name: name in there for name in available})
        assert resolve(Config()).device == device
        assert resolve(Config(device="cpu")).device == "cpu"


def test_a_blank_image_is_what_every_image_becomes(data_dir: Path, tmp_path: Path) -> None:
    result = run_quietly(tiny_config(data_dir, tmp_path, "vit_tiny", blank_images=True))
    answered = torch.tensor(result["confusion"]).sum(0)
    assert int((answered > 0).sum()) == 1


def test_a_report_is_written_where_it_is_asked_for(data_dir: Path, tmp_path: Path) -> None:
    run_quietly(tiny_config(data_dir, tmp_path / "with", epochs=1, report=True))
    assert "</html>" in (tmp_path / "with" / "report.html").read_text()


def test_triangle_trains_on_fresh_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ait.data import splits

    small = {"triangle": train_module.dataclasses.replace(splits._SETS["triangle"], sizes=(64, 20))}
    monkeypatch.setattr(splits, "_SETS", splits._SETS | small)
    config = tiny_config(tmp_path, tmp_path / "run", data="triangle", fresh=True, patch_size=32)
    result = run_quietly(config)
    assert result["test_images"] == 20 and len(result["confusion"]) == 2


def test_sort_of_clevr_reports_its_kinds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ait.data import splits

    small = {"sort_of_clevr": train_module.dataclasses.replace(splits._SETS["sort_of_clevr"], sizes=(20, 4))}
    monkeypatch.setattr(splits, "_SETS", splits._SETS | small)
    result = run_quietly(tiny_config(tmp_path, tmp_path / "run", data="sort_of_clevr", patch_size=25))
    assert [each["total"] for each in result["test_by_kind"].values()] == [40, 40, 40]
    assert sum(each["correct"] for each in result["test_by_kind"].values()) == result["test_correct"]
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model_arguments"]["question_dim"] == 18


def test_the_command_line_trains_with_a_progress_bar(data_dir: Path, tmp_path: Path) -> None:
    arguments = [
        "--data",
        "cifar10",
        "--data-dir",
        str(data_dir),
        "--model",
        "vit_tiny",
        "--out",
        str(tmp_path / "run"),
    ]
    arguments += ["--patch-size", "16", "--epochs", "1", "--batch-size", "16", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *arguments, "--options", *TINY_MODEL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parent.parent)
    assert done.returncode == 0, done.stderr
    assert "run: test accuracy" in done.stdout and "95 % interval" in done.stdout
    assert "vit_tiny: 100%" in done.stderr and "loss=" in done.stderr and "balance=" in done.stderr


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data", "cifar10", "--data-dir", "nowhere", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(
        SystemExit, match=r"^error: cifar10: expected nowhere to hold .* got no such folder\. To get it"
    ):
        train_module.main()
