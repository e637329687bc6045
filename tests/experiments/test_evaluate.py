"""Weights made from a run, tested again, and compared with their card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")

import evaluate as evaluate_module
import export_weights as export_module
from evaluate import Options, check_card, evaluate

import ait
from ait.models import pretrained
from tests.experiments.tiny import run_quietly, tiny_config

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run_quietly(tiny_config(data_dir, out))


def _export(run: Path, data_dir: Path, out: Path, **changes: Any) -> ait.models.PretrainedConfig:
    options = export_module.Options(run / "checkpoint.pt", out, data_dir=data_dir, **changes)
    return export_module.export(options)


def test_a_checkpoint_is_tested_as_its_run_was(run: tuple[Path, dict[str, Any]], data_dir: Path) -> None:
    out, result = run
    again = evaluate(Options(checkpoint=out / "checkpoint.pt", data_dir=data_dir, threads=1))
    for name in ("test_correct", "test_images", "test_accuracy", "test_interval_95"):
        assert again[name] == result[name]


def test_exported_weights_are_the_checkpoint_s_in_float16(
    run: tuple[Path, dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    out, result = run
    path = tmp_path / "tiny.safetensors"
    config = _export(out, data_dir, path)
    read, tensors = pretrained.read_weights(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert json.loads(json.dumps(read.to_metadata())) == config.to_metadata()
    assert (read.model, read.data, read.epochs) == ("ait_tiny", "cifar10", result["kept_epoch"])
    assert read.classes == tuple(f"class {index}" for index in range(10))
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)["state_dict"]
    assert tensors.keys() == checkpoint.keys()
    for name, tensor in checkpoint.items():
        half = tensor.is_floating_point() and not name.endswith("memory.gamma")
        assert torch.equal(tensors[name], tensor.half() if half else tensor), name
    model = ait.create_model(read.model, **read.model_arguments)
    pretrained.assign_weights(model, read, tensors)
    again = tmp_path / "again.safetensors"
    _export(out, data_dir, again)
    assert again.read_bytes() == path.read_bytes()


def test_nothing_is_overwritten_or_exported_from_half_a_run(
    run: tuple[Path, dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    out, _ = run
    path = tmp_path / "there.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"expected a new file, got .*there\.safetensors; see --overwrite"):
        _export(out, data_dir, path)
    assert path.read_text() == "mine"
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        _export(lonely, data_dir, tmp_path / "new.safetensors")
    other = json.loads((out / "result.json").read_text()) | {"model": "vit_tiny"}
    (lonely / "result.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"of the checkpoint's run, .*ait_tiny.* got .*vit_tiny"):
        _export(lonely, data_dir, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_numbers_too_large_for_float16_are_refused() -> None:
    model = ait.create_model("vit_tiny")
    with torch.no_grad():
        model.head.bias[3] = 1e6
    with pytest.raises(ValueError, match=r"expected head\.bias to be finite in torch\.float16, got inf"):
        export_module.rounded(model)


def test_shipped_weights_are_tested_and_held_against_their_card(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "ait_tiny", "--pretrained", "cifar10", "--data-dir", str(data_dir), "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    evaluate_module.main()
    assert "ait_tiny.cifar10 on cifar10: test accuracy" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments, "--check-card"])
    with pytest.raises(SystemExit, match=r"expected the card's accuracy to 0\.1 points, got"):  # these data are noise
        evaluate_module.main()


def test_two_models_are_compared_on_the_same_images(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "ait_tiny", "--against", "vit_tiny", "--pretrained", "cifar10", "--data-dir", str(data_dir)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments, "--threads", "1"])
    evaluate_module.main()
    first, second, difference, images = capsys.readouterr().out.splitlines()
    assert first.startswith("ait_tiny.cifar10 on cifar10") and second.startswith("vit_tiny.cifar10 on cifar10")
    counts = [round(float(line.split("accuracy ")[1].split(" %")[0]) / 5) for line in (first, second)]  # of 20
    assert difference.startswith(f"ait_tiny.cifar10 less vit_tiny.cifar10: {5 * (counts[0] - counts[1]):+.2f} points")
    assert "of 20 right in the first alone" in images


def test_the_card_s_figure_allows_a_tenth_of_a_point() -> None:
    assert "the card states 75.41 %, -0.10 points from it" in check_card(0.7531, 0.7541)
    with pytest.raises(ValueError, match=r"got 75\.52 %"):
        check_card(0.7552, 0.7541)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of --pretrained and --checkpoint"),
        ({"pretrained": "cifar10", "checkpoint": Path("a.pt")}, "expected one of --pretrained and --checkpoint"),
        ({"pretrained": "cifar10"}, "--pretrained needs --model"),
        ({"checkpoint": Path("a.pt"), "check_card": True}, "--check-card needs --pretrained"),
        ({"checkpoint": Path("a.pt"), "against": "vit_tiny"}, "--against needs --pretrained"),
        ({"model": "ait_tiny", "pretrained": "mnist"}, "no pretrained weights 'mnist'"),
        ({"model": "ait_tiny", "pretrained": "cifar10", "data": "digits"}, "expected data cifar10"),
        ({"model": "ait_tiny", "pretrained": "cifar10", "threads": 0}, "expected threads to be at least 1"),
    ],
)
def test_what_cannot_be_tested_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Options(**options))


def test_questions_are_put_to_the_model_and_a_blind_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ait.data import splits

    small = {"sort_of_clevr": dataclasses.replace(splits._SETS["sort_of_clevr"], sizes=(20, 4))}
    monkeypatch.setattr(splits, "_SETS", splits._SETS | small)
    options = {"data": "sort_of_clevr", "patch_size": 25, "epochs": 1}
    result = run_quietly(tiny_config(tmp_path, tmp_path / "seeing", "vit_tiny", **options))
    again = evaluate(Options(checkpoint=tmp_path / "seeing" / "checkpoint.pt"))
    assert (again["test_correct"], again["test_images"]) == (result["test_correct"], 120)
    run_quietly(tiny_config(tmp_path, tmp_path / "blind", "vit_tiny", blank_images=True, **options))
    with pytest.raises(ValueError, match="expected a model that was shown its images"):
        evaluate(Options(checkpoint=tmp_path / "blind" / "checkpoint.pt"))
