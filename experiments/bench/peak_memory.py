"""How much memory a call needs at its peak, from what the kernel of Linux counts."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from baselines import ours_write
from workloads import Problem, Shape

from ait.ops import bottleneck_select

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
M_MMAP_THRESHOLD = -3  # of <malloc.h>


def resident_kib(name: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak since its last reset), in KiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Most resident memory during ``function()`` beyond what there was before; None where the system cannot tell.

    The function is called once before, so that buffers which live on are not counted; what the C library then keeps
    for later goes back to the system, or it would hide as much of the peak.
    """
    function()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text(RESET_PEAK)
    except (OSError, AttributeError):
        return None
    before = resident_kib("VmRSS")
    function()
    return (resident_kib("VmHWM") - before) * 1024


def write_extra_bytes(shape: Shape, threads: int) -> int | None:
    """Beyond inputs, outputs and the gradient of the tokens.

    That gradient is the last to be made, so that it would hide what was in use before it: the same problem on narrow
    tokens, whose gradient is small, shows what the balance loss and its backward take, whatever the width.
    """
    torch.set_num_threads(threads)
    problem, narrow = Problem(shape), Problem(replace(shape, dim=1))
    forward = peak_bytes(problem.forward(ours_write))
    loss = peak_bytes(narrow.forward_and_backward(ours_write))
    both = peak_bytes(problem.forward_and_backward(ours_write))
    if forward is None or loss is None or both is None:
        return None
    return max(forward, loss, both - problem.tokens.nbytes)


def select_extra_bytes(shape: Shape, threads: int) -> int | None:
    """Beyond query, tokens, and the values and indices that are the result."""
    torch.set_num_threads(threads)
    rows = shape.num_heads * shape.num_slots
    query, tokens = torch.randn(1, rows, shape.dim), torch.randn(shape.tokens, shape.dim)
    peak = peak_bytes(lambda: bottleneck_select(query, tokens, shape.k))
    return None if peak is None else peak - rows * shape.k * (4 + 8)


def in_own_process(measure: Callable[[Shape, int], int | None], shape: Shape, threads: int) -> int | None:
    """``measure(shape, threads)`` where nothing but what is in use counts.

    A process that has worked before keeps freed memory in pieces of the wrong size, and the same call took 10 to 47 MB.
    So it runs in a new one, whose C library takes large pieces from the system and gives them back at once.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _keep_no_large_pieces) as pool:
        return pool.submit(measure, shape, threads).result()


def _keep_no_large_pieces() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's: elsewhere there is no such threshold
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 17)  # what it is at the start, but no longer growing
