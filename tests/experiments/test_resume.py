"""Interrupted runs: they go on bit for bit, refuse to go on as another run, and lose nothing to a full disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import train as train_module
from interrupt import Interrupt
from run_folder import digest, load_checkpoint, save_checkpoint, write_atomically
from train import Config

from tests.experiments.tiny import TINY_MODEL, TINY_WORKSPACE, run_quietly, tiny_config

BY_THE_CLOCK = ("images_per_second", "seconds")


def _lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in BY_THE_CLOCK} for line in lines]


def _arrays(path: Path) -> dict[str, bytes]:
    with np.load(path) as file:
        return {name: file[name].tobytes() for name in file.files}


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A real SIGINT after the forward pass of a step, counted from 1 over the whole run."""
    real, calls = train_module.F.cross_entropy, []

    def cross_entropy(*arguments: Any, **options: Any) -> torch.Tensor:
        if "label_smoothing" in options:
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(train_module.F, "cross_entropy", cross_entropy)


def _stopped(config: Config, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _interrupt_at(patch, step)
        with pytest.raises(Interrupt):
            run_quietly(config)
    assert not (config.out / "result.json").exists()


@pytest.mark.parametrize("model", ["ait_tiny", "vit_tiny"])
@pytest.mark.parametrize(
    ("changes", "step"),
    [({}, 1), ({}, 2), ({}, 3), ({}, 6), ({"accumulate": 2, "batch_size": 6}, 4), ({"amp": True}, 3)],
    ids=["in the first epoch", "at its end", "in the second", "after the last", "accumulating", "mixed precision"],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, changes: dict[str, Any], step: int
) -> None:
    changes = {"epochs": 3, **changes}
    whole = run_quietly(tiny_config(data_dir, tmp_path / "whole", model, **changes))
    config = tiny_config(data_dir, tmp_path / "parts", model, **changes)
    _stopped(config, step, monkeypatch)
    torch.manual_seed(123)  # whatever happened in between
    resumed = run_quietly(train_module.dataclasses.replace(config, resume=True))
    assert _lines(tmp_path / "parts") == _lines(tmp_path / "whole")
    for name in ("checkpoint.pt", "last.pt"):
        a, b = (load_checkpoint(tmp_path / run / name)["state_dict"] for run in ("whole", "parts"))
        assert digest(a) == digest(b)
    if model == "ait_tiny":
        assert any(name.endswith("memory.gamma") for name in a)
        for name in ("memory.npz", "recording.npz"):
            assert _arrays(tmp_path / "parts" / name) == _arrays(tmp_path / "whole" / name), name
    for name in ("test_loss", "test_correct", "confusion", "kept_epoch"):
        assert resumed[name] == whole[name]


def test_a_run_can_be_interrupted_again_and_again(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_quietly(tiny_config(data_dir, tmp_path / "whole", epochs=3))
    config = tiny_config(data_dir, tmp_path / "parts", epochs=3)
    _stopped(config, 1, monkeypatch)
    config = train_module.dataclasses.replace(config, resume=True)
    for _ in range(4):
        _stopped(config, 1, monkeypatch)
    run_quietly(config)
    assert _lines(tmp_path / "parts") == _lines(tmp_path / "whole")


def test_lines_after_the_checkpoint_and_half_a_line_are_written_again(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power failure leaves them."""
    config = tiny_config(data_dir, tmp_path / "run", epochs=3)
    _stopped(config, 3, monkeypatch)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lr": 7}\n{"epoch": 3, "l')
    run_quietly(train_module.dataclasses.replace(config, resume=True))
    run_quietly(tiny_config(data_dir, tmp_path / "whole", epochs=3))
    assert _lines(tmp_path / "run") == _lines(tmp_path / "whole")


def test_another_config_is_refused_and_each_difference_named(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data_dir, tmp_path, "vit_tiny")
    _stopped(config, 1, monkeypatch)
    before = (tmp_path / "last.pt").read_bytes()
    other = train_module.dataclasses.replace(config, resume=True, lr=0.5, seed=3, options=(*TINY_MODEL, "depth=2"))
    message = r"resume it: lr was 0.001 and is 0.5; options was .*; seed was 0 and is 3$"
    with pytest.raises(ValueError, match=message):
        run_quietly(other)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_other_data_are_refused(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data_dir, tmp_path / "run", "vit_tiny")
    _stopped(config, 1, monkeypatch)
    real = train_module.load_images

    def others(*arguments: Any, **options: Any) -> Any:
        splits = real(*arguments, **options)
        splits.train.labels[0] = (splits.train.labels[0] + 1) % 10
        return splits

    monkeypatch.setattr(train_module, "load_images", others)
    with pytest.raises(ValueError, match="expected the data of the run to resume it, got others"):
        run_quietly(train_module.dataclasses.replace(config, resume=True))


def test_nothing_to_resume_and_a_finished_run_are_errors(data_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(data_dir, tmp_path / "run", "vit_tiny", epochs=1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*last\.pt"):
        run_quietly(train_module.dataclasses.replace(config, resume=True))
    run_quietly(config)
    with pytest.raises(ValueError, match="expected an unfinished run to resume"):
        run_quietly(train_module.dataclasses.replace(config, resume=True))
    with pytest.raises(ValueError, match="expected --resume or --overwrite, got both"):
        run_quietly(train_module.dataclasses.replace(config, resume=True, overwrite=True))


def test_a_run_that_started_from_a_checkpoint_goes_on_with_the_same_options(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_quietly(tiny_config(data_dir, tmp_path / "first", epochs=1))
    start = {"init_from": tmp_path / "first" / "checkpoint.pt", "epochs": 2}
    run_quietly(tiny_config(data_dir, tmp_path / "whole", **start))
    config = tiny_config(data_dir, tmp_path / "parts", **start)
    _stopped(config, 3, monkeypatch)
    run_quietly(train_module.dataclasses.replace(config, resume=True))
    assert _lines(tmp_path / "parts") == _lines(tmp_path / "whole")


def test_going_on_with_other_code_is_said_and_recorded(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    revision = ["before"]
    monkeypatch.setattr(train_module, "git_revision", lambda: revision[0])
    config = tiny_config(data_dir, tmp_path, "vit_tiny")
    _stopped(config, 1, monkeypatch)
    revision[0] = "after"
    result = run_quietly(train_module.dataclasses.replace(config, resume=True))
    assert (result["git_revision"], result["git_revisions"]) == ("before", ["before", "after"])
    assert "goes on with other code: before before, after now" in capsys.readouterr().err


def test_an_altered_checkpoint_is_refused(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data_dir, tmp_path, "vit_tiny")
    _stopped(config, 1, monkeypatch)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    content["state_dict"]["head.bias"][0] += 1
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="to have the SHA-256 that it states"):
        run_quietly(train_module.dataclasses.replace(config, resume=True))


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The kernel refuses to let any file grow past 64 KiB, as it refuses on a full disk."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"state_dict": {"weight": torch.arange(8)}})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write last\.pt: .*what was saved there before stays"):
            save_checkpoint(path, {"state_dict": {"weight": torch.zeros(1 << 16)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(path)["state_dict"]["weight"].tolist() == list(range(8))


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: Any) -> None:
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["a"].add_(1),
        lambda content: content.update(b=[1, 3.0]),
        lambda content: content.update(a=content["a"].double()),
        lambda content: content.update(a=content["a"].view(2, 1)),
        lambda content: content.pop("b"),
    ],
)
def test_the_digest_sees_every_change(change: Callable[[dict[str, Any]], Any]) -> None:
    content: dict[str, Any] = {"a": torch.tensor([1.0, 2.0]), "b": [1, 2.0], 3: {"c": (None, "d", True)}}
    before = digest(content)
    assert digest({"a": torch.tensor([1.0, 2.0]), "b": [1, 2.0], 3: {"c": (None, "d", True)}}) == before
    change(content)
    assert digest(content) != before


def test_the_environment_is_recorded_at_the_start(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopped(tiny_config(data_dir, tmp_path, "vit_tiny"), 1, monkeypatch)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"]["running"] == torch.__version__ and "git_revision" in environment


def test_accumulated_batches_give_the_gradient_of_the_large_batch(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a ViT, in which images do not meet: two batches of 16 are one of 32, but for rounding."""
    real = train_module.load_images

    def not_augmented(*arguments: Any, **options: Any) -> Any:
        return train_module.dataclasses.replace(real(*arguments, **options), crop_padding=0, flip=False)

    def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr)  # AdamW's steps hardly depend on the gradient's scale

    monkeypatch.setattr(train_module, "load_images", not_augmented)
    monkeypatch.setattr(train_module.torch.optim, "AdamW", sgd)
    changed = {"epochs": 4, "lr": 0.1, "clip_norm": 0.0}
    for name, changes in {"large": {"batch_size": 32}, "parts": {"batch_size": 16, "accumulate": 2}}.items():
        run_quietly(tiny_config(data_dir, tmp_path / name, "vit_tiny", **changed, **changes))
    first, second = (_lines(tmp_path / name) for name in ("large", "parts"))
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_ctrl_c_on_the_command_line_says_how_to_go_on(data_dir: Path, tmp_path: Path) -> None:
    arguments = ["--data", "cifar10", "--data-dir", str(data_dir), "--out", str(tmp_path / "a run"), "--threads", "1"]
    arguments += ["--patch-size", "16", "--batch-size", "16", "--epochs", "100000"]
    command = [sys.executable, train_module.__file__, *arguments, "--options", *TINY_MODEL, *TINY_WORKSPACE]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "a run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "Stopped; all is saved. To go on:" in said and f"'{tmp_path / 'a run'}'" in said
    assert said.rstrip().endswith("--resume")
    assert load_checkpoint(tmp_path / "a run" / "last.pt")["progress"]["epoch"] >= 1
    assert not list((tmp_path / "a run").glob("*.tmp"))
    shutil.rmtree(tmp_path / "a run")
