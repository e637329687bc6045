"""bottleneck_select: the kernel's paths: tiles, threads, ready logits, products of bfloat16, memory."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ait
from ait.ops import reference
from tests.ops import common
from tests.ops.bottleneck_select_inputs import (
    SHAPES,
    StableSort,
    bfloat16_products,
    random_mask,
    sample_inputs,
)
from tests.ops.common import DTYPES, LAYOUTS, THREADS, assert_same_bits, generator, needs_kernels, num_threads
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- Determinism ----------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 150, 3000, 24), (1, 1, 9000, 40), (3, 20, 4096, 16), (40, 2, 700, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_number_of_threads(dtype: torch.dtype, shape: tuple) -> None:
    query, tokens = sample_inputs(shape, dtype)
    results = []
    for threads in THREADS:
        with num_threads(threads):
            results.append(ait.ops.bottleneck_select(query, tokens, 100, random_mask(shape[2], 0.1)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@needs_kernels
@pytest.mark.parametrize("k", [1, 40, 5000])
def test_same_bits_for_every_tile_size_and_split_of_the_tokens(k: int) -> None:
    from ait import _C

    query, tokens = sample_inputs((1, 50, 1500, 20))
    query, tokens = query[0].mul(2).round(), tokens[:, 0].mul(2).round()  # many ties across tiles
    for mask in (None, random_mask(1500)):
        expected = ait.ops.bottleneck_select(query[None], tokens, k, mask)
        for tile in (*range(1, 45), 97, 512, 1499, 1500, 5000):
            ranges = {1: 1, 2: 1500, 3: 7}.get(tile, 1 + tile % 5)
            numpy_mask = None if mask is None else mask.numpy()
            actual = _C.bottleneck_select_tiled(query.numpy(), tokens.numpy(), k, numpy_mask, tile, ranges)
            for a, e in zip(actual, expected, strict=True):
                assert_same_bits(torch.from_numpy(a), e[0], f"tile {tile}, {ranges} ranges")


@needs_kernels
def test_every_path_of_the_kernel_was_taken() -> None:
    from ait import _C

    query, tokens = sample_inputs((1, 40, 4096, 64))
    ones, logits = torch.ones(40, 1, 1), torch.randn(4096, 40, 1)
    calls = {
        "select_calls": lambda: ait.ops.bottleneck_select(query, tokens, 4096),
        "select_list_cuts": lambda: ait.ops.bottleneck_select(query, tokens, 8),
        "select_cuts_in_ties": lambda: ait.ops.bottleneck_select(query, torch.ones_like(tokens), 8),
        "select_closed_rows": lambda: ait.ops.bottleneck_select(query, torch.full_like(tokens, math.nan), 8),
        "select_tiles_in_place": lambda: ait.ops.bottleneck_select(query, tokens, 8),
        "select_tiles_copied": lambda: ait.ops.bottleneck_select(query, tokens.bfloat16(), 8),
        "select_masked_calls": lambda: ait.ops.bottleneck_select(query, tokens, 8, random_mask(4096)),
        "select_split_rows": lambda: ait.ops.bottleneck_select(query[:, :1], tokens, 8),
        "select_elementwise_calls": lambda: ait.ops.bottleneck_select(ones, logits, 8),
    }
    if bfloat16_products() != "none":
        calls["select_bfloat16_calls"] = lambda: ait.ops.bottleneck_select(query, tokens, 8, None, torch.bfloat16)
    taken = {}
    with num_threads(4):
        for name, call in calls.items():
            _C.reset_path_counters()
            assert _C.path_counters()[name] == 0
            call()
            taken[name] = _C.path_counters()[name]
        _C.reset_path_counters()
        ait.ops.bottleneck_select(query, tokens, 8)
        others = _C.path_counters()
    assert all(taken.values()), taken
    assert others["select_tasks"] >= 2
    for name in ("cuts_in_ties", "closed_rows", "masked_calls", "elementwise_calls", "bfloat16_calls"):
        assert others[f"select_{name}"] == 0, name


# ---- Ready logits: one row a group, width 1 --------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 32, 80, 300])
def test_ready_logits_give_the_bits_of_any_other_call(rows: int, dtype: torch.dtype, layout: str) -> None:
    query, tokens = sample_inputs((rows, 1, 500, 1), dtype)
    query, tokens = LAYOUTS[layout](query), LAYOUTS[layout](tokens.squeeze(-1)).unsqueeze(-1)
    cases = itertools.product((query, torch.ones_like(query)), (None, random_mask(500)), (1, 9, 100, 499))
    for own_query, mask, k in cases:
        for selection_dtype in (None, torch.bfloat16):
            actual = ait.ops.bottleneck_select(own_query, tokens, k, mask, selection_dtype)
            # Two rows a group are multiplied like any others.
            doubled = ait.ops.bottleneck_select(own_query.expand(rows, 2, 1), tokens, k, mask, selection_dtype)
            for a, e in zip(actual, doubled, strict=True):
                assert_same_bits(a, e[:, :1], f"k = {k}, {selection_dtype}")


@needs_kernels
def test_ready_logits_that_repeat_one_token() -> None:
    row = torch.randn(1, 64, 1, generator=generator(0))
    values, indices = ait.ops.bottleneck_select(torch.ones(64, 1, 1), row.expand(3000, 64, 1), 70)
    assert torch.equal(indices, torch.arange(70).expand(64, 1, 70))
    assert torch.equal(values, row.view(64, 1, 1).expand(64, 1, 70))


@needs_kernels
def test_nothing_is_read_once_no_row_lets_anything_in() -> None:
    from ait import _C

    tiles, logits = [], torch.zeros(8192, 64, 1)
    for num_nans in (59, 60):
        logits[:num_nans] = math.nan
        _C.reset_path_counters()
        values, indices = ait.ops.bottleneck_select(torch.ones(64, 1, 1), logits, 60)
        tiles.append(_C.path_counters()["select_tiles_in_place"])
        assert torch.equal(indices, torch.arange(60).expand(64, 1, 60))
        assert values.isnan().sum() == 64 * num_nans
    assert tiles[0] > 50
    assert tiles[1] < 10


# ---- Products of bfloat16 --------------------------------------------------------------------------------------------

PRODUCTS = bfloat16_products()
needs_bfloat16 = pytest.mark.skipif(PRODUCTS == "none", reason="needs a processor that multiplies bfloat16")
FROM = (torch.float32, torch.bfloat16, torch.float16)


def select_bfloat16(query: Tensor, tokens: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """With a look at the counter: products of bfloat16 were used."""
    from ait import _C

    _C.reset_path_counters()
    result = ait.ops.bottleneck_select(query, tokens, k, mask, torch.bfloat16)
    assert _C.path_counters()["select_bfloat16_calls"] == (result[0].numel() > 0)
    return result


@needs_bfloat16
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] > 0 and shape[1::2] != (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FROM, ids=str)
def test_bfloat16_logits_match_and_the_selection_is_their_stable_sort(
    dtype: torch.dtype, layout: str, shape: tuple
) -> None:
    query, tokens = (LAYOUTS[layout](x) for x in sample_inputs(shape, dtype, torch.float32))
    num_tokens = shape[2]
    logits, _ = select_bfloat16(query, tokens, max(num_tokens, 1))
    expected = torch.einsum("grd,tgd->grt", query.bfloat16().double(), tokens.bfloat16().double())
    assert_close(logits, expected, "logits")
    for mask in (None, random_mask(num_tokens)):
        stable_sort = StableSort(logits, mask)
        for k in (1, 7, 64, num_tokens + 1):
            actual = select_bfloat16(query, tokens, k, mask)
            for a, e in zip(actual, stable_sort.first(k), strict=True):
                assert_same_bits(a, e, f"k = {k}")


def bfloat16_products_of(query: Tensor, tokens: Tensor) -> Tensor:
    """The exact products (d, G, R, T), d filled up to a multiple of 32."""
    pad = (0, -query.shape[-1] % 32)
    query, tokens = (F.pad(x.bfloat16().double(), pad) for x in (query, tokens))
    return torch.einsum("grd,tgd->dgrt", query, tokens)


@needs_bfloat16
def test_bfloat16_products_are_added_one_by_one_in_float32_in_a_known_order() -> None:
    query, tokens = sample_inputs((1, 20, 90, 77))
    actual, _ = select_bfloat16(query, tokens, 90)
    total = torch.zeros(1, 20, 90)
    for block in bfloat16_products_of(query, tokens).split(32):
        if PRODUCTS == "amx_bf16":
            even, odd = torch.zeros(2, 1, 20, 90)
            for pair in block.split(2):
                even, odd = (even.double() + pair[0]).float(), (odd.double() + pair[1]).float()
            total = total + (even + odd)
        else:
            for pair in block.split(2):
                for product in (pair[1], pair[0]):
                    total = (total.double() + product).float()
    assert_same_bits(actual, total)


@needs_bfloat16
@pytest.mark.parametrize("dtype", FROM, ids=str)
def test_bfloat16_logits_depend_on_no_neighbour_tile_or_thread(dtype: torch.dtype) -> None:
    query, tokens = sample_inputs((2, 40, 2000, 51), dtype)
    logits, _ = select_bfloat16(query, tokens, 2000)
    for rows in ([0], [39], [5, 17, 33], list(range(1, 40))):
        for listed in ([0], [1999], [3, 50, 51, 120], list(range(7, 1800))):
            part, _ = select_bfloat16(query[:, rows], tokens[listed], len(listed))
            assert_same_bits(part, logits[:, rows][:, :, listed])
    results = []
    for threads in THREADS:
        with num_threads(threads):
            results.append(select_bfloat16(query, tokens, 100, random_mask(2000, 0.1)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@needs_bfloat16
def test_bfloat16_special_values() -> None:
    query, tokens = torch.ones(1, 20, 3), torch.zeros(600, 3)
    tokens[100, 0], tokens[200, 2], tokens[300, 1], tokens[400, 0] = math.nan, math.inf, -math.inf, 3e38
    values, indices = select_bfloat16(query, tokens, 3)
    assert (indices == torch.tensor([100, 200, 400])).all()
    assert values[0, 0, 0].isnan() and values[0, 0, 1] == math.inf and values[0, 0, 2] == tokens[400, 0].bfloat16()
    # Subnormal operands count as zero, so all are equal and the first are kept.
    tokens = torch.full((600, 3), 0.0)
    tokens[500] = 1e-39
    assert (select_bfloat16(query, tokens, 3)[1] == torch.arange(3)).all()


@needs_bfloat16
def test_bfloat16_exact_logits_equal_the_reference() -> None:
    for shape in SHAPES[:7]:
        query, tokens = ((2 * x).round().clamp(-8, 8) for x in sample_inputs(shape))
        for k in (1, 20, shape[2]):
            actual = select_bfloat16(query, tokens, k)
            for a, e in zip(actual, reference.bottleneck_select(query, tokens, k), strict=True):
                assert torch.equal(a, e), (shape, k)


@needs_bfloat16
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bfloat16_is_not_multiplied_unless_it_is_asked_for(dtype: torch.dtype) -> None:
    from ait import _C

    query, tokens = sample_inputs((1, 20, 90, 33), dtype)
    _C.reset_path_counters()
    for selection_dtype in (None, torch.float32, torch.float16):
        ait.ops.bottleneck_select(query, tokens, 5, None, selection_dtype)
    if dtype == torch.float64:
        ait.ops.bottleneck_select(query, tokens, 5, None, torch.bfloat16)
    else:
        ait.ops.bottleneck_select(query, tokens.bfloat16(), 5)
    assert _C.path_counters()["select_bfloat16_calls"] == 0


# ---- Memory ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Gives a function that tells by how many bytes the resident memory grew at its peak."""

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    before = kib("VmRSS")
    yield lambda: 1024 * (kib("VmHWM") - before)


@needs_kernels
def test_the_matrix_of_all_logits_is_never_held() -> None:
    query, tokens = torch.randn(1, 1024, 2), torch.randn(100_000, 2)
    with peak_memory() as grown:
        ait.ops.bottleneck_select(query, tokens, 16)
        assert grown() < 100 << 20  # the logits alone would be 390 MiB


@needs_kernels
def test_a_million_tokens_need_little_memory_and_are_selected_as_in_one_shot() -> None:
    from ait import _C

    num_tokens, k = 1 << 20, 512
    # Products of small integers are exact, so that any other way gives the same logits; many are equal.
    query = torch.randint(-9, 10, (1, 64, 3), generator=generator(0)).float()
    tokens = torch.randint(-99, 100, (num_tokens, 3), generator=generator(1)).float()
    rows = [0, 31, 63]
    logits = query[0, rows] @ tokens.T
    expected = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
    for threads in (1, 4):
        with num_threads(threads), peak_memory() as grown:
            values, indices = ait.ops.bottleneck_select(query, tokens, k)
            assert grown() < 64 << 20  # all logits would be 256 MiB
        assert torch.equal(indices[0, rows], expected)
        assert torch.equal(values[0, rows], logits.gather(1, expected))
    for tile, ranges in ((14, 1), (1000, 7)):
        tiled = _C.bottleneck_select_tiled(query[0].numpy(), tokens.numpy(), k, None, tile, ranges)
        assert np.array_equal(tiled[1], indices[0].numpy()) and np.array_equal(tiled[0], values[0].numpy())


@needs_kernels
@pytest.mark.parametrize("capability", common.lesser_capabilities())
def test_lesser_instruction_sets(capability: str) -> None:
    # All three files in one process: to start one takes as long as many of the tests.
    files = [f"tests/ops/test_bottleneck_select{part}.py" for part in ("", "_adversaries", "_paths")]
    operators = "float32-strided or exact or neighbours or rounds or first_are_kept or padding"
    ready = "ready and (float32-contiguous or float64-transposed or bfloat16-strided)"
    paths = f"tile_size or ({ready}) or every_path"
    adversaries = "adversarial or million_rows or many_groups or long_rows"
    common.run_tests_at_capability(files, capability, f"{operators} or {paths} or {adversaries}")


@needs_bfloat16
def test_a_named_instruction_set_has_no_bfloat16() -> None:
    common.run_tests_at_capability(["tests/ops/test_bottleneck_select.py"], "avx512", "rounds")


@needs_bfloat16
def test_the_expected_products_of_bfloat16_are_used() -> None:
    assert os.environ.get("AIT_BFLOAT16_PRODUCTS", PRODUCTS) == PRODUCTS


@pytest.mark.skipif(PRODUCTS != "amx_bf16", reason="nothing to choose from")
def test_lesser_products_of_bfloat16() -> None:
    tests = "(bfloat16 and not named and not lesser) or every_path"
    common.run_tests_with(
        {"AIT_BFLOAT16_PRODUCTS": "avx512_bf16"}, ["tests/ops/test_bottleneck_select_paths.py"], tests
    )


@needs_kernels
def test_products_of_bfloat16_can_be_switched_off() -> None:
    code = "from ait import _C; assert _C.bfloat16_products() == 'none'"
    environment = {**os.environ, "AIT_BFLOAT16_PRODUCTS": "none"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
