"""What the harness runs as CUDA would, and what it finds: barriers, bounds, values that nobody wrote."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import pytest

from .build import HERE, build
from .conftest import Case, Ending, build_broken, run_cases

pytestmark = pytest.mark.xdist_group("cuda_on_host")

THREADS = 96
Run = Callable[..., tuple[str, list[int]]]


@pytest.fixture(scope="module")
def run() -> Run:
    entry = ctypes.CDLL(str(build([HERE / "selftest.cpp"]))).cuda_on_host_selftest
    entry.restype = ctypes.c_char_p
    entry.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_int)]

    def run(name: str, seed: int = 1) -> tuple[str, list[int]]:
        out = (ctypes.c_int * (2 * THREADS))()
        error = entry(name.encode(), seed, out).decode()
        return error, list(out)

    return run


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverse", [THREADS - 1 - t for t in range(THREADS)]),
        ("neighbours", [t ^ 1 for t in range(THREADS)]),
        ("warp_operations", [0] * THREADS),
        ("histogram", [THREADS // 4] * THREADS),
    ],
)
def test_right_kernels_give_the_right_result_in_any_order(run: Run, name: str, expected: list[int]) -> None:
    for seed in range(20):
        assert run(name, seed) == ("", expected * 2)


def test_threads_and_blocks_run_in_an_order_that_the_seed_decides(run: Run) -> None:
    orders = [tuple(run("order_of_threads", seed)[1]) for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(2 * THREADS)) for order in orders)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reverse_without_barrier", "(conflict|uninitialised)"),
        ("neighbours_without_syncwarp", "(conflict|uninitialised)"),
        ("syncwarp_for_other_warps", "(conflict|uninitialised)"),
        ("write_after_read", "conflict"),
        ("histogram_without_atomics", "conflict"),
        ("two_blocks_write_the_same", "conflict.*another block"),
        ("reverse_off_by_one", "out of bounds.*element 96 of an array of 96"),
        ("global_off_by_one", "out of bounds.*element 192 of an array of 192"),
        ("before_the_begin", "out of bounds.*element -1 of an array of 192"),
        ("uninitialised_shared", "uninitialised.*element 0 "),
        ("uninitialised_global", "uninitialised"),
        ("barrier_after_an_exit", "divergent barrier.*1 threads of its block have ended"),
        ("barriers_apart", r"divergent barrier.*selftest.cpp:\d+"),
        ("absent_lanes", "for lanes of its warp that never come"),
        ("different_warp_operations", "divergent warp"),
        ("misaligned", "misaligned"),
        ("too_much_shared_memory", "8000 bytes of shared memory.*the launch gave 1024"),
    ],
)
def test_broken_kernels_are_found_with_every_seed(run: Run, name: str, message: str) -> None:
    for seed in range(10):
        error, _ = run(name, seed)
        assert_matches(error, message)


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), f"{text!r} does not say {pattern!r}"


# Operator: what is broken, file, what it says, what it should better not say, and what the harness says.
SLIPS = {
    "bottleneck_attend": {
        "removed barrier": (
            "bottleneck_attend_kernel.h",
            "listed);\n    __syncthreads();\n    tile_dots",
            "listed);\n    tile_dots",
            "conflict|uninitialised",
        ),
        "removed barrier at the end of a tile": (
            "bottleneck_attend_kernel.h",
            "sums, a.query_aligned);\n    __syncthreads();\n  }",
            "sums, a.query_aligned);\n  }",
            "conflict",
        ),
        "removed barrier before a slab is read": (
            "bottleneck_attend_slab_kernel.h",
            "  __syncthreads();\n  const int64_t most",
            "  const int64_t most",
            "conflict|uninitialised",
        ),
        "entries of two tokens in one place": (
            "bottleneck_attend_slab_kernel.h",
            "for (int u = 0; u < t; ++u)",
            "for (int u = 1; u < t; ++u)",
            "conflict",
        ),
    },
    "bottleneck_select": {
        "two threads write the same": (
            "bottleneck_select_kernel.h",
            "if (threadIdx.x == 0) a.counts[row] = kept;",
            "if (threadIdx.x <= 1) a.counts[row] = kept;",
            "conflict",
        ),
        "removed barrier": (
            "bottleneck_select_kernel.h",
            "histogram[bin] = 0;\n    __syncthreads();",
            "histogram[bin] = 0;",
            "conflict|uninitialised",
        ),
    },
    "hopfield_retrieve": {
        "removed barrier": (
            "hopfield_retrieve_kernel.h",
            "    __syncthreads();\n    multiply(tile, weights",
            "    multiply(tile, weights",
            "conflict|uninitialised",
        ),
        "off by one": (
            "hopfield_retrieve_kernel.h",
            "m < num_patterns && e < width) value",
            "m <= num_patterns && e < width) value",
            "out of bounds",
        ),
        "uninitialised": (
            "hopfield_retrieve_kernel.h",
            "    packed[i] = value;",
            "    if (e < width) packed[i] = value;",
            "uninitialised",
        ),
    },
}
CALLS = {
    "bottleneck_attend": (
        # Several parts of several tiles.
        "query, tokens = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8, requires_grad=True); "
        "ait.ops.bottleneck_attend(query, tokens, torch.arange(0, 200, 2).repeat(200, 1))[0].sum().backward()"
    ),
    "bottleneck_select": "ait.ops.bottleneck_select(torch.randn(1, 3, 4), torch.randn(900, 4), 20)",
    "hopfield_retrieve": "ait.ops.hopfield_retrieve(torch.randn(40, 24), torch.randn(5, 24))",
}


BROKEN = [(operator, what) for operator, slips in SLIPS.items() for what in slips]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ending]:
    """How the call of each operator that was broken on purpose ended."""
    cases = []
    for operator, what in BROKEN:
        folder = tmp_path_factory.mktemp("broken")
        library = build_broken(folder, operator, *SLIPS[operator][what][:3])
        cases.append(Case(library, f"import torch, ait; {CALLS[operator]}"))
    return dict(zip(BROKEN, run_cases(cases), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "what"), BROKEN)
def test_an_operator_broken_on_purpose_is_found(
    operator: str, what: str, endings: dict[tuple[str, str], Ending]
) -> None:
    status, output = endings[operator, what]
    assert status != 0
    assert_matches(output, f"cuda_on_host: ({SLIPS[operator][what][3]})")
