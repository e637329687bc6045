"""The least that must be done: what the benchmark holds times against beside the peak of multiply-adds."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

# Operations that e^x takes of the units that multiply and add: clamping, splitting off the power of two, the polynomial
# of degree 7 and scaling are fifteen instructions; each keeps a unit as busy as a multiply-add, which counts two.
EXP_FLOPS = 2.0 * 15


def retrieval_flops(tokens: int, dim: int, slots: int, steps: int, backward: bool) -> float:
    """Operations of :func:`ait.ops.hopfield_retrieve`, or of its backward.

    Forward: two products with the patterns, and one with their Gram matrix for each step after the first. Backward:
    five products with the patterns (one of them is the first step's logits again, since nothing that is as long as the
    tokens is kept for it), and for each further step one forward and two back. One exponential an entry and step.
    """
    wide, narrow = 2.0 * tokens * dim * slots, 2.0 * tokens * slots * slots
    products = 5 * wide + 3 * (steps - 1) * narrow if backward else 2 * wide + (steps - 1) * narrow
    return products + EXP_FLOPS * tokens * slots * steps


def fresh_pages(num_bytes: int) -> None:
    """Takes memory from the system, in huge pages where there are, has all threads touch it, and gives it back.

    That is what a result costs which is too large for the allocator to keep: the system clears its pages.
    """
    page = 4096
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        # Four bytes a page: enough that torch splits them among threads.
        view = torch.frombuffer(memory, dtype=torch.uint8)
        view[:: page // 4].fill_(1)
        del view


def read_all(x: Tensor) -> Tensor:
    """Reads all of a contiguous tensor, and does as little as it can with it."""
    return x.sum()  # reads faster than a maximum
