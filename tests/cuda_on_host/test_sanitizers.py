"""What goes wrong within a thread's own arrays, of which the harness has no record: the sanitizers see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.common import needs_kernels

from .build import HERE, ROOT, SANITIZERS, build, operator_sources, sanitizer_libraries
from .conftest import build_broken

pytestmark = [
    needs_kernels,
    pytest.mark.xdist_group("cuda_on_host"),
    pytest.mark.slow,
    pytest.mark.skipif(not sanitizer_libraries(), reason="the C++ compiler comes without AddressSanitizer's library"),
]

# Every kernel: each dtype, odd and even widths, whole and broken tiles, parts, chunks, both paths of attention, little
# shared memory, several steps.
EVERY_KERNEL = """
import ctypes, sys, torch, ait
from tests.cuda_on_host.plugin import LIBRARY
from tests.ops.test_bottleneck_attend import gradients_like, random_lists
generator = torch.Generator().manual_seed(0)

def randn(*shape, dtype):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

def backward(*outputs):
    outputs = [x for x in outputs if x.requires_grad]
    torch.autograd.backward(outputs, gradients_like(outputs))

def run_attend(dtype):
    # Rows, entries, tokens, width; path: by slabs, gathered or dense (not for float16); bytes of shared memory.
    for (rows, entries, tokens, width), path, shared_bytes in (
        ((130, 40, 50, 20), -1, 232448),
        ((2, 80, 150, 19), 0, 232448),
        ((90, 33, 40, 140), 0, 1000),
        ((3, 40, 70, 12), 1, 232448),
    ):
        path = min(path, 0) if dtype == torch.float16 else path
        ctypes.CDLL(LIBRARY).cuda_on_host_configure(1, shared_bytes, 3, 0, path)
        lists = random_lists(rows, entries, tokens)
        backward(*ait.ops.bottleneck_attend(randn(rows, width, dtype=dtype), randn(tokens, width, dtype=dtype), lists))

def run_select(dtype):
    query, tokens = randn(2, 3, 5, dtype=dtype), randn(700, 2, 5, dtype=dtype)
    ait.ops.bottleneck_select(query, tokens, 90, torch.rand(700, generator=generator) < 0.2)
    if dtype == torch.bfloat16:  # several chunks, terms of a float32 query
        ait.ops.bottleneck_select(randn(1, 1, 2, dtype=torch.float32), randn(17000, 2, dtype=dtype), 40)

def run_hopfield(dtype):
    little = 74_000 if dtype == torch.float64 else 37_000
    for (tokens, patterns, width), steps, tol, shared_bytes in (
        ((40, 33, 64), 1, 0.0, 232448), ((33, 5, 30), 3, 1e-3, 232448), ((35, 6, 12), 67, 0.0, little)
    ):
        ctypes.CDLL(LIBRARY).cuda_on_host_configure(1, shared_bytes, 2, 0, 0)
        state, patterns = randn(tokens, width, dtype=dtype), randn(patterns, width, dtype=dtype)
        backward(ait.ops.hopfield_retrieve(state, patterns, 0.5, steps, tol)[0])

RUN = {"bottleneck_attend": run_attend, "bottleneck_select": run_select, "hopfield_retrieve": run_hopfield}
for operator in sys.argv[1:]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        RUN[operator](dtype)
"""


def run_sanitized(library: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the sanitizer's library in front and the library's operators in place of the CPU's."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "AIT_CUDA_ON_HOST_LIBRARY": str(library),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "LD_PRELOAD": " ".join(map(str, sanitizer_libraries())),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")


def test_no_kernel_leaves_its_own_arrays_or_relies_on_undefined_behaviour() -> None:
    library = build(operator_sources(), optimise="-O1", sanitizers=SANITIZERS)
    result = run_sanitized(library, EVERY_KERNEL, "bottleneck_attend", "bottleneck_select", "hopfield_retrieve")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


def test_a_local_array_off_by_one_is_found(tmp_path: Path) -> None:
    right = "for (int i = 0; i < kEntries; ++i) {\n    const C total"
    slip = "bottleneck_attend_kernel.h", right, right.replace("i < kEntries", "i <= kEntries")
    library = build_broken(tmp_path, "bottleneck_attend", *slip, sanitizers=SANITIZERS)
    result = run_sanitized(library, EVERY_KERNEL, "bottleneck_attend")
    assert result.returncode != 0
    assert re.search(r"runtime error: index \d+ out of bounds|AddressSanitizer: stack-buffer", result.stderr)


SELFTEST = """
import ctypes, os, sys, torch
entry = ctypes.CDLL(os.environ["AIT_CUDA_ON_HOST_LIBRARY"]).cuda_on_host_selftest
entry.restype, entry.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p]
for name in sys.argv[1:]:
    print(name, entry(name.encode(), 1, (ctypes.c_int * 192)()).decode(), flush=True)
"""


def test_stacks_of_fibers_are_watched_also_after_an_error() -> None:
    library = build([HERE / "selftest.cpp"], optimise="-O1", sanitizers=SANITIZERS)
    # Errors leave fibers behind, whose stacks are used again.
    names = ("reverse", "uninitialised_shared", "barriers_apart", "warp_operations", "local_array", "reverse")
    result = run_sanitized(library, SELFTEST, *names, "local_array_off_by_one")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(names)
    assert lines[-1] == "reverse " and "divergent barrier" in lines[2]
    assert result.returncode != 0
    assert "AddressSanitizer: stack-buffer-overflow" in result.stderr
