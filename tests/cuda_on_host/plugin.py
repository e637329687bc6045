"""Plugin of pytest (``-p tests.cuda_on_host.plugin``): the CUDA kernels, on fibers, in place of the CPU's kernels.

Environment: ``AIT_CUDA_ON_HOST_LIBRARY``, what :func:`tests.cuda_on_host.build.build` made; ``AIT_CUDA_ON_HOST`` as
``seed,shared_bytes,multiprocessors,dry,dense``; dry 1: launches are recorded, and nothing runs; dense 0 or 1: whether
dense paths are taken, -1: as the cost model says.
"""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

import torch

import ait  # noqa: F401  (defines the operators that are replaced here)

LIBRARY = os.environ["AIT_CUDA_ON_HOST_LIBRARY"]
SETTINGS = os.environ.get("AIT_CUDA_ON_HOST", "1,232448,3,0,-1")


def load() -> None:
    torch.ops.load_library(LIBRARY)
    configure = ctypes.CDLL(LIBRARY).cuda_on_host_configure
    configure.argtypes = [ctypes.c_uint64, *[ctypes.c_int64] * 4]
    configure(*map(int, SETTINGS.split(",")))


class Launch(NamedTuple):
    """A launch of a kernel; or a product of the library (no threads), with its rows and columns."""

    blocks: int
    threads: int
    shared_bytes: int


def take_launches() -> list[Launch]:
    """The launches since the last call."""
    take = ctypes.CDLL(LIBRARY).cuda_on_host_take_launches
    take.argtypes, take.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    numbers = (ctypes.c_int64 * 3000)()
    count = take(numbers, 1000)
    assert count <= 1000
    return [Launch(*numbers[3 * i : 3 * i + 3]) for i in range(count)]


load()
