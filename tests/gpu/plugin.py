"""Plugin of pytest (``-p tests.gpu.plugin``): calls with CPU tensors run on the GPU, and come back.

So the operators' own tests (tests/ops) test the CUDA kernels on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ait  # noqa: F401  (defines the operators that are replaced here)
from ait.ops._library import LIBRARY, SCHEMAS, WITHOUT_CUDA_KERNELS


def moved(value: Any, device: str) -> Any:
    """Tensors on ``device``; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def elsewhere(operator: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``operator``, computed on ``device`` from tensors of the CPU, its results on the CPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        there = [moved(x, device) for x in args], {name: moved(x, device) for name, x in kwargs.items()}
        return tuple(moved(x, "cpu") for x in operator(*there[0], **there[1]))

    return run


def load() -> None:
    for name in set(SCHEMAS) - WITHOUT_CUDA_KERNELS:
        operator = elsewhere(getattr(torch.ops.ait, name), "cuda")
        LIBRARY.impl(name, operator, "CPU", allow_override=True)


if torch.cuda.is_available():
    load()
