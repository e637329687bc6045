"""What the tests of all operators share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ait.ops._library import is_pure_python

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
THREADS = (1, 2, 3, 4)
CAPABILITIES = ("baseline", "avx2", "avx512")
needs_kernels = pytest.mark.skipif(is_pure_python(), reason="needs the compiled kernels")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contiguous(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def strided(x: Tensor) -> Tensor:
    """The values of ``x`` in every third column and second row of a larger tensor that holds NaN elsewhere."""
    filler = float("nan") if x.is_floating_point() else -(2**40)
    large = torch.full([2 * x.shape[0] + 1, *x.shape[1:-1], 3 * x.shape[-1] + 2], filler, dtype=x.dtype)
    view = large[1 : 2 * x.shape[0] + 1 : 2, ..., 2 : 3 * x.shape[-1] + 2 : 3]
    return view.copy_(x.detach())


def transposed(x: Tensor) -> Tensor:
    """The values of ``x`` with its first dimension innermost in memory."""
    return x.detach().movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "strided": strided,
    "transposed": transposed,
}


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Asserts equality bit by bit, NaNs and signs of zero included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    as_bytes = [x.detach().contiguous().view(torch.uint8) if x.numel() else x for x in (actual, expected)]
    assert torch.equal(*as_bytes), f"{name}: {int((as_bytes[0] != as_bytes[1]).sum())} bytes differ"


def lesser_capabilities() -> list[str]:
    """The instruction sets that this process could have been limited to; none where it already is."""
    if is_pure_python() or "AIT_TEST_CAPABILITY" in os.environ:
        return []
    from ait import _C

    best = CAPABILITIES.index(_C.cpu_capability())
    return list(CAPABILITIES[:best])


def run_tests_at_capability(test_files: list[str], capability: str, expression: str) -> None:
    """Runs the tests of ``test_files`` that ``expression`` names in a process limited to an instruction set.

    It must run at least one, and tell that the limit holds: one of the files has a test named
    ``test_the_expected_instruction_set_runs`` that calls :func:`assert_expected_instruction_set`.
    """
    limits = {
        "ATEN_CPU_CAPABILITY": "default" if capability == "baseline" else capability,
        "AIT_TEST_CAPABILITY": capability,
    }
    run_tests_with(limits, test_files, f"({expression}) or the_expected_instruction_set")


def run_tests_with(variables: dict[str, str], test_files: list[str], expression: str) -> None:
    """Runs the tests of ``test_files`` that ``expression`` names, at least one, with these environment variables."""
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, *test_files, "-k", expression],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def assert_expected_instruction_set() -> None:
    """Inside :func:`run_tests_at_capability`: the limited instruction set is what runs."""
    from ait import _C

    expected = os.environ.get("AIT_TEST_CAPABILITY")
    if expected is not None:
        assert _C.cpu_capability() == expected
