"""What was built, what is running, and why."""

from __future__ import annotations

import platform
from typing import Any, Literal

import torch

from ait._version import __version__
from ait.ops._first_use import VERDICTS
from ait.ops._library import SCHEMAS, is_pure_python, why_no_cuda_kernels

PURE_PYTHON_REASON = "no: AIT_PURE_PYTHON=1 asked for the reference operators"


def _cuda_status() -> str:
    if is_pure_python():
        return PURE_PYTHON_REASON
    missing = why_no_cuda_kernels()
    if missing is not None and torch.cuda.is_available():
        return f"no: {missing}; the reference operators run there"
    from ait._build_info import BUILD_INFO

    kernels = missing or f"kernels {BUILD_INFO['cuda']}"
    return f"yes: {kernels}" if torch.cuda.is_available() else f"no: torch sees no CUDA device; {kernels}"


def _kernels(name: str) -> str:
    """What runs for ``ait::name``, device type by device type."""
    implemented = [
        key.lower() for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(f"ait::{name}", key)
    ]
    if not implemented:
        return "reference"
    runs = f"C++ on {' and '.join(implemented)}, reference elsewhere"
    wrong_on = [str(device) for device, wrong in VERDICTS.items() if name.removesuffix("_backward") in wrong]
    return runs + (f" and on {', '.join(wrong_on)}, where the kernel was found to be wrong" if wrong_on else "")


def config() -> dict[str, Any]:
    """The versions, build and kernels in use, as :func:`show_config` prints them."""
    info: dict[str, Any] = {
        "ait": __version__,
        "python": platform.python_version(),
        "torch": {"running": torch.__version__},
        "cuda": _cuda_status(),
        "instruction set": "that of torch (reference operators)",
        "threads": torch.get_num_threads(),
    }
    if not is_pure_python():
        from ait._build_info import BUILD_INFO
        from ait._C import cpu_capability

        info["torch"]["built against"] = BUILD_INFO["torch"]
        info["compiler"] = BUILD_INFO["compiler"]
        info["instruction set"] = f"{cpu_capability()} (built for {', '.join(BUILD_INFO['capabilities'])})"
    # The snapshot is one implementation for all devices, so there is nothing to tell about it.
    info["kernels"] = {name: _kernels(name) for name in SCHEMAS if name != "memory_snapshot"}
    return info


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Prints which versions, instruction set and kernels are in use, and why CUDA is or is not.

    Args:
        mode: ``"stdout"`` prints; ``"dicts"`` returns the same as a dictionary (as in :func:`numpy.show_config`).

    Raises:
        ValueError: another ``mode``.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"show_config: expected mode 'stdout' or 'dicts', got {mode!r}")
    info = config()
    if mode == "dicts":
        return info
    for key, value in info.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for inner_key, inner_value in value.items():
                print(f"  {inner_key + ':':<29}{inner_value}")
        else:
            print(f"{key + ':':<17}{value}")
    return None
