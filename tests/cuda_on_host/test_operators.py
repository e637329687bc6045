"""The operators' own tests, run on the CUDA kernels; and sources that are the same for both compilers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.ops.common import needs_kernels

from .build import ROOT, compiler
from .conftest import run_python
from .selections import LEFT_OUT, SELECTIONS

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]

KERNEL_HEADERS = sorted((ROOT / "csrc" / "cuda").glob("*_kernel.h"))
# Headers that CUDA and host have each their own of.
REPLACED = {path.name for path in (ROOT / "tests" / "cuda_on_host" / "include" / "cuda").glob("*.h")}

# Bytes of shared memory with which not everything fits, and tests that go there then.
SMALL_DEVICE = {
    "bottleneck_attend": (800, "match_the_reference and float32"),
    "hopfield_retrieve": (75_000, "match_the_reference and float64 and 6"),
}


# Properties that the library's products do not have: bits that no other row changes.
NOT_DENSE = "row_does_not_depend or row_does_not_list"


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
    run_operator_tests(operator, library, selection, settings=f"7,{shared_bytes},2,0,0")


@pytest.mark.slow
def test_the_operators_tests_pass_on_the_dense_path(library: Path) -> None:
    selection = f"{SELECTIONS['bottleneck_attend']} and not ({NOT_DENSE})"
    run_operator_tests("bottleneck_attend", library, selection, settings="3,232448,3,0,1")


DENSE_AND_GATHERED = """
import ctypes, math, torch, ait
from tests.cuda_on_host.plugin import LIBRARY, take_launches
from tests.ops.test_bottleneck_attend import gradients_like, random_lists, run_with_gradients, sample_inputs
from tests.tolerances import assert_close

def run(dense, *inputs):
    ctypes.CDLL(LIBRARY).cuda_on_host_configure(1, 232448, 3, 0, dense)
    result = run_with_gradients(*inputs)
    products = [launch for launch in take_launches() if launch.threads == 0]
    return result, products

for dtype in (torch.float32, torch.float64, torch.bfloat16):
    query, tokens, indices = sample_inputs((5, 80, 150, 36), dtype, torch.float32)
    for bad in (None, "unlisted token", "listed token", "query"):
        if bad == "unlisted token":  # of rows 1 and 3 no longer, of rows 0, 2 and 4
            indices[1][indices[1] == 17] = indices[1].max() + 1 if indices[1].max() < 149 else -1
            indices = torch.stack([row[row != 17][:79] for row in torch.nn.functional.pad(indices, (0, 1), value=-1)])
            tokens[17, 3] = math.nan
            tokens[17, 5] = math.inf
        elif bad == "listed token":
            tokens[indices[0, 2]] = math.inf
        elif bad == "query":
            query[1, 0] = math.nan
        gathered, none = run(0, query, tokens, indices)
        dense, several = run(1, query, tokens, indices)
        assert not none and len(several) == 5 * 3  # chunks of 64 tokens
        for name, value in dense.items():
            assert_close(value, gathered[name], f"{name}, {dtype}, {bad}")
        if bad in (None, "unlisted token"):
            assert all(x.isfinite().all() for name, x in dense.items() if name != "lse"), bad
"""


def test_dense_and_gathered_attention_agree_whatever_unlisted_tokens_hold(library: Path) -> None:
    result = run_python(library, "-c", DENSE_AND_GATHERED)
    assert result.returncode == 0, result.stderr


SLABS_AND_GATHERED = """
import ctypes, torch, ait
from tests.cuda_on_host.plugin import LIBRARY, take_launches
from tests.ops.test_bottleneck_attend import gradients_like, run_with_gradients, sample_inputs

def run(dense, shared_bytes, *inputs):
    ctypes.CDLL(LIBRARY).cuda_on_host_configure(1, shared_bytes, 8, 0, dense)
    result = run_with_gradients(*inputs)
    return result, [launch for launch in take_launches() if launch.threads == 1024]

# Rows, entries, tokens, width: several slabs, the last one broken; rows beyond a warp; several ranges of tokens.
for shape, shared_bytes in (((5, 63, 100, 150), 232448), ((70, 20, 90, 36), 20000), ((3, 300, 2100, 7), 232448)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        inputs = sample_inputs(shape, dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        inputs[1][1] = torch.inf
        gathered, none = run(0, shared_bytes, *inputs)
        by_slabs, one = run(-1, shared_bytes, *inputs)
        assert (len(none), len(one)) == (0, 0 if shape[0] == 70 and dtype == torch.float64 else 1), (none, one)
        for name, value in by_slabs.items():
            assert torch.equal(value.nan_to_num(nan=7), gathered[name].nan_to_num(nan=7)), (name, dtype, shape)
"""


@pytest.mark.slow
def test_gradients_of_tokens_by_slabs_have_the_bits_of_gathered_ones(library: Path) -> None:
    result = run_python(library, "-c", SLABS_AND_GATHERED)
    assert result.returncode == 0, result.stderr


def conditional_lines(text: str) -> list[str]:
    """Lines that leave text out for one compiler or the other."""
    return re.findall(r"(?m)^\s*#\s*(?:if|ifdef|ifndef|elif|else)\b.*$", text)


def test_a_branch_for_the_host_alone_would_be_found() -> None:
    assert conditional_lines("#ifdef threadIdx\n  __syncthreads();\n#endif\n") == ["#ifdef threadIdx"]
    assert conditional_lines("  # if defined(__CUDACC__)\n#pragma unroll\n") == ["  # if defined(__CUDACC__)"]


TWO_PRODUCTS = r"\+=[^;,]*\*[^;,]*[+-][^;,]*\*[^;,]*;"


def test_two_products_in_one_sum_would_be_found() -> None:
    assert re.findall(TWO_PRODUCTS, "sum[c] += gate * grad[c] +\n  grad_logit * query[c];")
    assert not re.findall(TWO_PRODUCTS, "sum += a * b; sum += c * d; e = a * b + c * d; sum += t[i * n + m];")


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cuda").glob("*_*.h")), ids=lambda path: path.name)
def test_products_are_added_one_by_one_so_that_kernels_agree_in_what_is_fused(path: Path) -> None:
    assert re.findall(TWO_PRODUCTS, re.sub(r"\[[^\[\]]*\]", "", path.read_text())) == []


# What waits for the device, allocates beside torch's cache, or hands a value to the host: none of it can be captured.
WAITING = r"cuda\w*Synchronize|cudaMalloc|cudaFree|cudaMemcpy|cudaEvent|StreamQuery|\.item|local_scalar|const_data_ptr<"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cuda").glob("*.*")), ids=lambda path: path.name)
def test_nothing_waits_for_the_device_so_that_graphs_can_be_captured(path: Path) -> None:
    if path.suffix != ".md":
        assert not re.findall(WAITING, path.read_text())


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
        # Nor may anything else than a compiler's own macro decide, such as a name that the harness defines.
        assert conditional_lines(text) == [], header.name
        body = re.sub(r"(?m)^#include.*$", "", text)
        results = []
        for macros in ([], ["-D__CUDACC__", "-D__NVCC__", "-D__CUDA_ARCH__=900"]):
            command = [compiler(), "-std=c++20", "-E", "-P", *macros, "-x", "c++", "-"]
            results.append(subprocess.run(command, input=body, capture_output=True, text=True, check=True).stdout)
        assert results[0] == results[1], header.name
    assert path.name in seen
