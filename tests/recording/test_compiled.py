"""Recording models that are compiled, in whole or in part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ait
from tests.recording.models import hook_count, small_model, some_images
from tests.tolerances import assert_close

LAYERS = ["blocks.0.mlp.workspace", "blocks.1.mlp.workspace"]


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_by_block(model: nn.Module) -> nn.Module:
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="aot_eager")  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_by_block])
def test_compiled_models_run_eagerly_inside_and_are_not_compiled_anew(
    compiled: Callable[[nn.Module], nn.Module],
) -> None:
    torch.compiler.reset()
    model = compiled(small_model().eval())
    expected = model(some_images())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with ait.record(model) as trace:
        actual = model(some_images())
    assert_close(actual, expected, "logits")
    assert trace.layer_names == LAYERS and len(trace) == 1
    assert torch.equal(model(some_images()), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert hook_count(model) == 0


def test_recordings_that_end_in_another_order_leave_compilation_as_it_was() -> None:
    torch.compiler.reset()
    model = compiled_whole(small_model().eval())
    first, second = ait.recording.Recorder(model), ait.recording.Recorder(model)
    first.start()
    second.start()
    first.stop()
    model(some_images())
    second.stop()
    assert len(second.trace) == 1 and len(first.trace) == 0
    torch._dynamo.utils.counters.clear()
    model(some_images())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_recording_that_begins_inside_a_compiled_function_is_an_error_that_says_where_to_put_it(
    fullgraph: bool,
) -> None:
    torch.compiler.reset()
    model = small_model().eval()

    @torch.compile(backend="aot_eager", fullgraph=fullgraph)
    def step(images: Tensor) -> Tensor:
        with ait.record(model):
            return model(images)

    with pytest.raises(RuntimeError, match=r"put `with ait\.record"):
        step(some_images())
    assert hook_count(model) == 0
    torch.compiler.reset()
    with ait.record(model) as trace:
        model(some_images())
    assert len(trace) == 1
