"""Plugin of pytest (``-p tests.cuda_on_host.plugin``): the CUDA kernels, on fibers, in place of the CPU's kernels.

Environment: ``AIT_CUDA_ON_HOST_LIBRARY``, what :func:`tests.cuda_on_host.build.build` made; ``AIT_CUDA_ON_HOST`` as
``seed,shared_bytes,multiprocessors``.
"""

from __future__ import annotations

import ctypes
import os

import torch

import ait  # noqa: F401  (defines the operators that are replaced here)

LIBRARY = os.environ["AIT_CUDA_ON_HOST_LIBRARY"]
SETTINGS = os.environ.get("AIT_CUDA_ON_HOST", "1,232448,3")


def load() -> None:
    torch.ops.load_library(LIBRARY)
    configure = ctypes.CDLL(LIBRARY).cuda_on_host_configure
    configure.argtypes = [ctypes.c_uint64, ctypes.c_int64, ctypes.c_int64]
    configure(*map(int, SETTINGS.split(",")))


load()
