"""The CUDA kernels on a GPU: values, gradients, streams, graphs, devices. Skipped where there is none."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ait
from ait.ops import reference
from ait.ops._library import is_pure_python, why_no_cuda_kernels
from tests.ops import test_bottleneck_attend as attend_tests
from tests.ops import test_bottleneck_select as select_tests
from tests.ops import test_hopfield_retrieve as hopfield_tests
from tests.ops.common import DTYPES, assert_same_bits
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(is_pure_python() or why_no_cuda_kernels() is not None, reason="needs the CUDA kernels"),
]

# (R, k, T, E), (G, R, T, d), (T, M, E): those of the CPU's tests, and larger ones.
LARGE = os.environ.get("AIT_GPU_SMALL_SHAPES") != "1"
# The second lists half of all tokens, so that the dense path is taken; the last is the default shape.
LARGE_ATTEND = [(256, 128, 8192, 768), (256, 4096, 8192, 256), (256, 512, 32768, 768)]
# Whose token gradient goes by slabs, the last of them broken, and whose products are the library's: small enough for
# compute-sanitizer (tests/cuda_on_host/test_device_shapes.py holds them to it).
SLAB_SHAPE, DENSE_SHAPE = (64, 256, 100, 500), (64, 3000, 100, 500)
ATTEND_SHAPES = [*attend_tests.SHAPES, SLAB_SHAPE, DENSE_SHAPE, *(LARGE_ATTEND if LARGE else [])]
SELECT_SHAPES = [*select_tests.SHAPES, *([(1, 64, 40_000, 48)] if LARGE else [])]
HOPFIELD_SHAPES = [*hopfield_tests.SHAPES, *([(4096, 32, 768), (50, 700, 768)] if LARGE else [])]


def attend(query: Tensor, tokens: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients on the GPU, by name; incoming gradients as the CPU's tests draw them."""
    query, tokens = (x.detach().cuda().requires_grad_() for x in (query, tokens))
    outputs = ait.ops.bottleneck_attend(query, tokens, indices.cuda())
    incoming = [x.cuda() for x in attend_tests.gradients_like(tuple(x.detach().cpu() for x in outputs))]
    grads = torch.autograd.grad(outputs, (query, tokens), incoming)
    return dict(zip((*attend_tests.NAMES, "grad_query", "grad_tokens"), (*outputs, *grads), strict=True))


@pytest.mark.parametrize("shape", ATTEND_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_matches_the_reference_and_repeats_its_bits(dtype: torch.dtype, shape: tuple) -> None:
    inputs = attend_tests.sample_inputs(shape, dtype, torch.float32)
    first, again, expected = attend(*inputs), attend(*inputs), attend_tests.reference_with_gradients(*inputs)
    for name, value in first.items():
        assert_close(value.cpu(), expected[name], name)
        assert_same_bits(again[name].cpu(), value.cpu(), name)


def retrieve(state: Tensor, patterns: Tensor, beta: float, steps: int, tol: float) -> dict[str, Tensor]:
    state, patterns = (x.detach().cuda().requires_grad_() for x in (state, patterns))
    outputs = ait.ops.hopfield_retrieve(state, patterns, beta, steps, tol)
    generator = hopfield_tests.generator(1)
    grad_out = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state.dtype).cuda()
    grads = torch.autograd.grad(outputs[0], (state, patterns), grad_out)
    return dict(zip((*hopfield_tests.NAMES, "grad_state", "grad_patterns"), (*outputs, *grads), strict=True))


@pytest.mark.parametrize("shape", HOPFIELD_SHAPES, ids=str)
@pytest.mark.parametrize("steps_tol", hopfield_tests.STEPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retrieve_matches_the_reference_and_repeats_its_bits(
    dtype: torch.dtype, steps_tol: tuple, shape: tuple
) -> None:
    state, patterns = hopfield_tests.sample_inputs(shape, dtype, torch.float32)
    arguments = state, patterns, hopfield_tests.inverse_temperature(shape[2]), *steps_tol
    first, again = retrieve(*arguments), retrieve(*arguments)
    expected = hopfield_tests.reference_with_gradients(*arguments)
    for name, value in first.items():
        if name == "steps_taken":
            assert torch.equal(value.cpu(), expected[name])
        else:
            assert_close(value.cpu(), expected[name], name)
        assert_same_bits(again[name].cpu(), value.cpu(), name)


@pytest.mark.parametrize("shape", SELECT_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_is_the_stable_sort_of_its_logits(dtype: torch.dtype, shape: tuple) -> None:
    num_tokens = shape[2]
    query, tokens = (x.cuda() for x in select_tests.sample_inputs(shape, dtype, torch.float32))
    logits, _ = ait.ops.bottleneck_select(query, tokens, num_tokens + 5)
    expected = torch.einsum("grd,tgd->grt", query.double(), tokens.double())
    assert_close(logits, expected, "logits")
    for mask in (None, select_tests.random_mask(num_tokens)):
        for k in (1, 7, max(1, num_tokens // 3), num_tokens + 1):
            on_device = None if mask is None else mask.cuda()
            actual = [x.cpu() for x in ait.ops.bottleneck_select(query, tokens, k, on_device)]
            expected_values, expected_indices = select_tests.StableSort(logits.cpu(), mask).first(k)
            assert torch.equal(actual[1], expected_indices)
            assert_same_bits(actual[0], expected_values)


def test_special_logits_are_selected_in_order() -> None:
    special = torch.tensor([0.0, math.nan, -math.inf, math.inf, -0.0, 1.0, math.nan, -1.0])[:, None].cuda()
    for k in range(1, 9):
        actual = ait.ops.bottleneck_select(torch.ones(1, 1, 1).cuda(), special, k)
        expected = reference.bottleneck_select(torch.ones(1, 1, 1), special.cpu(), k)
        assert torch.equal(actual[1].cpu(), expected[1])


def layer_and_input() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = ait.GlobalWorkspaceLayer(96, num_slots=8, slot_dim=16, num_heads=4, top_k=20)
    return layer.cuda(), torch.randn(8, 50, 96, device="cuda")


def test_another_stream_than_the_default_one_is_used() -> None:
    layer, x = layer_and_input()
    ait.freeze_memory(layer)
    expected = layer(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows on another stream would read zeros
        late.copy_(x)
        actual = layer(late)
    stream.synchronize()
    torch.testing.assert_close(actual, expected)


def assert_a_graph_replays(run: Callable[[], tuple[Tensor, ...]], tokens: Tensor) -> None:
    """A graph of ``run`` gives, for other values of ``tokens``, the bits of another call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tokens.copy_(torch.randn(tokens.shape))
    graph.replay()
    for actual, expected in zip(captured, run(), strict=True):
        assert_same_bits(actual.cpu(), expected.cpu())


def test_operators_can_be_captured_in_a_graph() -> None:
    query, tokens = torch.randn(1, 16, 64, device="cuda"), torch.randn(3000, 64, device="cuda", dtype=torch.bfloat16)
    patterns = torch.randn(8, 64, device="cuda")

    def run() -> tuple[Tensor, ...]:
        values, indices = ait.ops.bottleneck_select(query, tokens, 40)
        pooled, gates, _ = ait.ops.bottleneck_attend(query[0], tokens, indices[0])
        attended = query[0], tokens, indices[0], pooled, gates
        of_attention = torch.ops.ait.bottleneck_attend_backward(pooled, None, None, *attended)
        out, taken, _ = ait.ops.hopfield_retrieve(tokens, patterns, 0.1, 3, 0.01)
        of_retrieval = torch.ops.ait.hopfield_retrieve_backward(out, tokens, patterns, taken, 0.1, 3)
        return values, indices, pooled, gates, out, *of_attention, *of_retrieval

    assert_a_graph_replays(run, tokens)


@pytest.mark.parametrize("shape", [SLAB_SHAPE, DENSE_SHAPE], ids=["slabs", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_on_either_path_can_be_captured_in_a_graph(dtype: torch.dtype, shape: tuple) -> None:
    query, tokens, indices = (x.cuda() for x in attend_tests.sample_inputs(shape, dtype, torch.float32))

    def run() -> tuple[Tensor, ...]:
        outputs = ait.ops.bottleneck_attend(query, tokens, indices)
        saved = query, tokens, indices, *outputs[:2]
        return *outputs, *torch.ops.ait.bottleneck_attend_backward(*outputs, *saved)

    assert_a_graph_replays(run, tokens)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used_whatever_the_current_one_is() -> None:
    state, patterns = torch.randn(40, 32, device="cuda:1"), torch.randn(5, 32, device="cuda:1")
    with torch.cuda.device(0):
        out, _, _ = ait.ops.hopfield_retrieve(state, patterns)
    assert out.device == torch.device("cuda:1")
    assert_close(out.cpu(), reference.hopfield_retrieve(state.cpu(), patterns.cpu(), 1.0, 1, 0.0)[0])
    with pytest.raises(RuntimeError, match="expected patterns on cuda:1, got a tensor on cuda:0"):
        torch.ops.ait.hopfield_retrieve(state, patterns.to("cuda:0"), 1.0, 1, 0.0)


WRONG_VALUES = {
    "bottleneck_attend": (
        "torch.ops.ait.bottleneck_attend(torch.zeros(2, 8).cuda(), torch.zeros(9, 8).cuda(), "
        "torch.tensor([[0, 1], [3, 2]]).cuda())",
        "expected indices ascending and unique in [0, 9), -1 last, got something else in row 1",
    ),
    "hopfield_retrieve": (
        "x = torch.zeros(4, 8).cuda(); "
        "torch.ops.ait.hopfield_retrieve_backward(x, x, x, torch.tensor([1, 1, 7, 1]).cuda(), 1.0, 3)",
        "expected steps_taken from 1 to 3, got 7",
    ),
}


@pytest.mark.parametrize("operator", WRONG_VALUES)
def test_wrong_values_stop_the_kernel_with_a_message(operator: str) -> None:
    call, message = WRONG_VALUES[operator]
    script = f"import torch, ait; {call}; torch.cuda.synchronize()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr and "device-side assert" in result.stderr


def test_tensors_of_the_cpu_in_a_cuda_call_are_errors() -> None:
    state, patterns = torch.randn(4, 8, device="cuda"), torch.randn(3, 8)
    with pytest.raises(ValueError, match="expected patterns on the device of state"):
        ait.ops.hopfield_retrieve(state, patterns)
    with pytest.raises(RuntimeError, match="expected patterns on cuda:0, got a tensor on no CUDA device"):
        torch.ops.ait.hopfield_retrieve(state, patterns, 1.0, 1, 0.0)
