"""Errors of recordings say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ait
from ait.recording import MemoryHistory, Trace, WorkspaceLogger
from tests.recording.models import hook_count, small_model, some_images


@pytest.mark.parametrize("model", [nn.Linear(2, 2), ait.create_model("vit_tiny")], ids=["Linear", "ViT"])
def test_a_model_without_workspace(model: nn.Module) -> None:
    expected = r"record: expected a model with a GlobalWorkspace.*without one.*insert_workspace.*create_model"
    with pytest.raises(ValueError, match=expected), ait.record(model):
        pass
    for name, make in {"MemoryHistory": MemoryHistory, "record": lambda m: WorkspaceLogger(Scalars(), m)}.items():
        with pytest.raises(ValueError, match=f"{name}: expected a model with a GlobalWorkspace"):
            make(model)


class Scalars:
    def add_scalar(self, *args: Any) -> None: ...

    def add_histogram(self, *args: Any) -> None: ...


def test_no_module_at_all() -> None:
    with pytest.raises(ValueError, match=r"record: expected a torch.nn.Module, got str"), ait.record("model"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("layers", [["blocks.7"], [2], [-3], "blocks.", ["norm2"], [True], [1.5], 1.5], ids=str)
def test_layers_that_do_not_exist(layers: Any) -> None:
    model = small_model()
    expected = r"record: expected layers by index \(0 to 1\) or name \('blocks.0.mlp.workspace', 'blocks.1"
    with pytest.raises(ValueError, match=expected), ait.record(model, layers=layers):
        pass
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(layers=[]), "at least one layer, or layers=None"),
        (dict(write="never"), "write to be one of 'always', 'as_run'"),
        (dict(max_passes=0), "max_passes >= 1"),
        (dict(energy_steps=-1), "energy_steps >= 1"),
        (dict(energy_steps=2.0), "energy_steps to be an integer"),
        (dict(device="nope"), "device to be one of torch's, such as 'cpu', got 'nope'"),
        (dict(device=1.5), "device to be one of torch's, such as 'cpu', got 1.5"),
        (dict(layers=0, attention=True), "layers=None with attention=True"),
    ],
    ids=str,
)
def test_options_that_are_wrong(options: dict[str, Any], expected: str) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=expected), ait.record(model, **options):
        pass
    assert hook_count(model) == 0


def test_an_empty_trace_and_records_that_are_not_there() -> None:
    model = small_model().eval()
    with ait.record(model) as trace:
        pass
    with pytest.raises(ValueError, match="expected a forward pass of the model inside the recording, got none"):
        trace.layer(0)
    with ait.record(model, write="as_run") as trace:
        model(some_images())
    with pytest.raises(ValueError, match=r"expected the index of one of 1 recorded passes, got 3"):
        trace[3]
    with pytest.raises(ValueError, match=r"expected a recorded layer .*'blocks.1.mlp.workspace'.*got 'head'"):
        trace.layer("head")
    with pytest.raises(ValueError, match=r"one of 'blocks.0.mlp.workspace', 'blocks.1.mlp.workspace'\), got 'blocks'"):
        trace.layer("blocks")
    with pytest.raises(ValueError, match=r"plot: expected a write of layer .*write='always'"):
        trace.layer(0).require_write("plot")
    with pytest.raises(ValueError, match=r"expected values of shape \(..., 64\), one for each token, got \(3,\)"):
        trace.layer(0).by_image(torch.zeros(3))


def test_a_recorder_that_is_started_twice() -> None:
    recorder = ait.recording.Recorder(small_model())
    recorder.start()
    with pytest.raises(RuntimeError, match="got one that is; stop"):
        recorder.start()
    recorder.stop()
    recorder.stop()


def test_a_recording_that_is_entered_again_goes_on_and_within_itself_is_an_error() -> None:
    model = small_model().eval()
    recording = ait.record(model)
    for number in (1, 2):
        with recording as trace:
            model(some_images())
        model(some_images())
        assert len(trace) == number and hook_count(model) == 0
    with recording, pytest.raises(RuntimeError, match="expected a recorder that is not recording"), recording:
        pass
    assert hook_count(model) == 0


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_hold_something_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(FileNotFoundError, match="expected a file, got"):
        Trace.load(path)
    path.write_bytes(b"no such thing")
    for load in (Trace.load, MemoryHistory.load):
        with pytest.raises(ValueError, match=r"load: expected a file that ait wrote, got .*x\."):
            load(path)
    history = MemoryHistory(small_model())
    history.log(0)
    history.save(path)
    with pytest.raises(ValueError, match=r"expected a file that Trace\.save wrote"):
        Trace.load(path)
    with ait.record(small_model()) as trace:
        pass
    trace.save(path)
    with pytest.raises(ValueError, match="expected a history"):
        MemoryHistory.load(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_were_altered_or_cut_are_named_wherever_it_was(tmp_path: Path, suffix: str) -> None:
    model = small_model().eval()
    with ait.record(model) as trace:
        model(some_images())
    path = tmp_path / f"x{suffix}"
    trace.save(path)
    whole = path.read_bytes()
    for part in range(1, 8):
        path.write_bytes(whole[: len(whole) * part // 8])
        with pytest.raises(ValueError, match=rf"x\{suffix}"):
            Trace.load(path)
    damages = [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(0, len(whole), 997)]
    for damage in damages:
        path.write_bytes(damage)
        try:
            Trace.load(path)  # a flipped bit of a number may pass
        except ValueError as error:
            assert str(path) in str(error)


def test_other_arrays_are_no_trace_and_pickles_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="expected a file that ait wrote"):
        Trace.load(tmp_path / "x.npz")


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with ait.record(small_model()) as trace:
        pass
    for path in ("trace.pt", "trace"):
        with pytest.raises(ValueError, match=r"Trace.save: expected a path that ends in .npz or .safetensors"):
            trace.save(tmp_path / path)
    with pytest.raises(FileNotFoundError, match="expected a file in a folder that is there"):
        trace.save(tmp_path / "missing" / "trace.npz")
    assert list(tmp_path.iterdir()) == []


def test_histories_without_steps_and_steps_out_of_order() -> None:
    history = MemoryHistory(small_model(), every=2)
    with pytest.raises(ValueError, match="at least one step kept by log"):
        history.memory()
    assert history.log(2) and not history.log(3)
    with pytest.raises(ValueError, match="expected a step after 2, got 0"):
        history.log(0)
    for step in (-1, "4", 4.0):
        with pytest.raises(ValueError, match="expected a step that is an integer of at least 0, got"):
            history.log(step)  # type: ignore[arg-type]
    for layer in ("head", "blocks", 2, True):
        with pytest.raises(
            ValueError, match=r"MemoryHistory: expected a recorded layer \(an index, or one of 'blocks.0"
        ):
            history.memory(layer)
    other = MemoryHistory(small_model(num_slots=5))
    with pytest.raises(ValueError, match=r"load_state_dict: expected memories of the model, .*\(5, 6\)"):
        other.load_state_dict(history.state_dict())
    with pytest.raises(ValueError, match="every >= 1"):
        MemoryHistory(small_model(), every=0)


def test_a_logger_needs_a_writer() -> None:
    with pytest.raises(ValueError, match="expected a writer with add_scalar"):
        WorkspaceLogger("runs", small_model())  # type: ignore[arg-type]
