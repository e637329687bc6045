"""How much memory a call needs at its peak, from what the kernel of Linux counts."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


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
