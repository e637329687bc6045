"""A copy of the memory that compilers cannot see through."""

from __future__ import annotations

import torch
from torch import Tensor

from ait.ops import reference
from ait.ops._library import LIBRARY, is_pure_python


def memory_snapshot(memory: Tensor) -> Tensor:
    """Copies ``memory``, for use by autograd while the original is overwritten in place.

    torch.compile's inductor backend may elide a plain ``clone()`` before an in-place update and then gives
    silently wrong gradients; it cannot elide an opaque operator.

    Args:
        memory: any tensor.

    Returns:
        A tensor of the same shape, dtype and values, in memory of its own; the gradient passes unchanged.
    """
    return torch.ops.ait.memory_snapshot(memory)


if is_pure_python():
    LIBRARY.impl("memory_snapshot", reference.memory_snapshot, "CompositeExplicitAutograd")


@torch.library.register_fake("ait::memory_snapshot")
def _(memory):
    return torch.empty_like(memory)


def _backward(ctx, grad):
    return grad


torch.library.register_autograd("ait::memory_snapshot", _backward)
