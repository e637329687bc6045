"""memory_snapshot: a copy that survives the in-place update of its original, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ait
from tests.ops.common import generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_copies_into_memory_of_its_own(dtype: torch.dtype) -> None:
    for shape in ((), (0, 4), (5,), (3, 4)):
        memory = torch.ones(shape).to(dtype)
        copy = ait.ops.memory_snapshot(memory)
        assert copy.dtype == dtype and torch.equal(copy, memory)
        if memory.numel():
            assert copy.data_ptr() != memory.data_ptr()
        memory.zero_()
        assert copy.all()


def test_keeps_the_values_of_strided_memory() -> None:
    memory = torch.arange(24.0).reshape(4, 6)[:, ::2].T
    assert torch.equal(ait.ops.memory_snapshot(memory), memory)


def test_the_gradient_passes_unchanged() -> None:
    memory = torch.randn(3, 4, generator=generator(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ait.ops.memory_snapshot, memory)


def test_opcheck() -> None:
    for requires_grad in (False, True):
        memory = torch.randn(3, 4, generator=generator(0), requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.ait.memory_snapshot.default, (memory,))


@pytest.mark.slow
def test_gradients_under_inductor_see_the_memory_before_its_update() -> None:
    def loss(memory: Tensor, weight: Tensor) -> Tensor:
        read = ait.ops.memory_snapshot(memory)
        result = (read @ weight).square().sum()
        with torch.no_grad():
            memory.mul_(0.5).add_(1.0)
        return result

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        memory = torch.randn(4, 5, generator=generator(0))
        weight = torch.randn(5, 6, generator=generator(1)).requires_grad_()
        value = function(memory, weight)
        grads.append((value.detach(), torch.autograd.grad(value, weight)[0], memory))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)
