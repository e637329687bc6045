"""The operators' own tests, run on the CUDA kernels; and sources that are the same for both compilers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.ops.common import needs_kernels

from .build import ROOT, compiler
from .conftest import run_python

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]

KERNEL_HEADERS = sorted((ROOT / "csrc" / "cuda").glob("*_kernel.h"))
# Headers that CUDA and host have each their own of.
REPLACED = {path.name for path in (ROOT / "tests" / "cuda_on_host" / "include" / "cuda").glob("*.h")}

# Tests of tests/ops that ask about the CPU alone, or are too large for fibers.
LEFT_OUT = "not (threads or compiled or instruction or most_steps or many_patterns or opcheck or without_dense)"
SELECTIONS = {
    "bottleneck_attend": "not (many_rows_may or layout and (float16 or float32))",
    "bottleneck_select": (
        "(adversarial and float32) or first_are_kept or padding or masked or nan_comes or panel"
        " or may_be_huge or wrong_arguments or (rounds_both and not float32) or one_group or expanded or no_gradient"
    ),
    "hopfield_retrieve": (
        "(match_the_reference and (float64 or bfloat16)) or gradcheck_through or every_output or tol or opposite"
        " or infinite_logits or wrong_arguments or checks_what or expanded or huge_inverse"
    ),
}
# Bytes of shared memory with which not everything fits, and tests that go there then.
SMALL_DEVICE = {
    "bottleneck_attend": (800, "match_the_reference and float32"),
    "hopfield_retrieve": (75_000, "match_the_reference and float64 and 6"),
}


def run_operator_tests(operator: str, library: Path, selection: str, settings: str | None = None) -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.cuda_on_host.plugin"]
    selection = f"({selection}) and {LEFT_OUT}"
    test_file = f"tests/ops/test_{operator}.py"
    result = run_python(library, "-m", "pytest", *options, "-k", selection, test_file, settings=settings)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) >= 5, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("operator", SELECTIONS)
def test_the_operators_tests_pass_on_the_cuda_kernels(operator: str, library: Path) -> None:
    run_operator_tests(operator, library, SELECTIONS[operator])


@pytest.mark.parametrize("operator", SMALL_DEVICE)
def test_what_does_not_fit_into_shared_memory_goes_through_global_memory(operator: str, library: Path) -> None:
    shared_bytes, selection = SMALL_DEVICE[operator]
    run_operator_tests(operator, library, selection, settings=f"7,{shared_bytes},2")


@pytest.mark.parametrize("path", KERNEL_HEADERS, ids=lambda path: path.name)
def test_kernel_bodies_are_the_same_text_for_both_compilers(path: Path) -> None:
    pending, seen = [path], set()
    while pending:
        header = pending.pop()
        if header.name in seen or header.name in REPLACED:
            continue
        seen.add(header.name)
        text = header.read_text()
        included = re.findall(r'#include ["<](?:cuda/)?([a-z_]+\.h)[">]', text)
        pending += [header.parent / name for name in included if (header.parent / name).exists()]
        body = re.sub(r"(?m)^#include.*$", "", text)
        results = []
        for macros in ([], ["-D__CUDACC__", "-D__NVCC__", "-D__CUDA_ARCH__=900"]):
            command = [compiler(), "-std=c++20", "-E", "-P", *macros, "-x", "c++", "-"]
            results.append(subprocess.run(command, input=body, capture_output=True, text=True, check=True).stdout)
        assert results[0] == results[1], header.name
    assert path.name in seen
