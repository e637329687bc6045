"""Traces and histories come back from their files as they were."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import ait
from ait.recording import MemoryHistory, Trace
from tests.recording.models import small_model, some_images


def assert_same(actual: Any, expected: Any, where: str = "trace") -> None:
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(actual, field.name), getattr(expected, field.name), f"{where}.{field.name}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    else:
        assert actual == expected, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_trace_is_saved_and_loaded_bit_for_bit(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    with ait.record(model, attention=True, energy_steps=2, keep_tokens=True, keep_inputs=True) as trace:
        model(some_images().to(dtype))
        model.eval()(some_images(1).to(dtype))
    trace.save(tmp_path / f"trace{suffix}")
    assert_same(Trace.load(tmp_path / f"trace{suffix}"), trace)
    assert [path.name for path in tmp_path.iterdir()] == [f"trace{suffix}"]


def test_an_empty_trace_and_one_without_bottleneck_are_saved(tmp_path: Path) -> None:
    model = small_model(top_k_ratio=1.0, reader="attention")
    with ait.record(model) as trace:
        trace.save(tmp_path / "trace.npz")
        assert_same(Trace.load(tmp_path / "trace.npz"), trace)
        model(some_images())
    trace.save(tmp_path / "trace.npz")
    assert_same(Trace.load(tmp_path / "trace.npz"), trace)


def test_moving_a_trace_leaves_the_first_where_it_is() -> None:
    model = small_model()
    with ait.record(model) as trace:
        model(some_images())
    moved = trace.to("meta")
    write = moved.layer(0).write
    assert write is not None and write.gates.is_meta and moved.layer(1).retrieval.is_meta
    assert not trace.layer(0).retrieval.is_meta
    assert moved.layer(0).shape == trace.layer(0).shape


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_history_holds_the_memory_as_it_was_at_each_step(tmp_path: Path, suffix: str) -> None:
    model = small_model().train()
    history = MemoryHistory(model, every=2)
    expected = []
    for step in range(5):
        if history.log(step):
            expected.append(model.get_submodule("blocks.1.mlp.workspace.memory").gamma.clone())
        model(some_images(step))
    assert history.steps == [0, 2, 4] and history.layer_names[-1] == "blocks.1.mlp.workspace"
    memory = history.memory(-1)
    torch.testing.assert_close(memory, torch.stack(expected))
    torch.testing.assert_close(history.distance(-1), (memory - memory[0]).norm(dim=-1))
    torch.testing.assert_close(history.similarity(-1), (memory * memory[0]).sum(-1))
    torch.testing.assert_close(history.gram(-1), memory @ memory.mT)
    assert float(history.distance(-1)[1:].min()) > 0

    history.save(tmp_path / f"history{suffix}")
    loaded = MemoryHistory.load(tmp_path / f"history{suffix}")
    assert (loaded.steps, loaded.every, loaded.layer_names) == (history.steps, 2, history.layer_names)
    assert torch.equal(loaded.memory(0), history.memory(0))
    with pytest.raises(ValueError, match="a history made of a model"):
        loaded.log(6)


def test_a_history_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    model = small_model().train()
    history = MemoryHistory(model)
    history.log(0)
    model(some_images())
    torch.save(history.state_dict(), tmp_path / "state.pt")
    history.log(1)
    again = MemoryHistory(model)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.log(1)
    assert again.steps == [0, 1]
    assert all(torch.equal(again.memory(layer), history.memory(layer)) for layer in (0, 1))
