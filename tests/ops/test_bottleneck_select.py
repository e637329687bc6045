"""bottleneck_select: exactness, ties, masks, PyTorch's features and abuse."""

from __future__ import annotations

import math

import pytest
import torch
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
    select_logits,
)
from tests.ops.common import DTYPES, LAYOUTS, assert_same_bits, generator, needs_kernels, num_threads
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = (torch.bfloat16, torch.float16)


def ks_for(num_tokens: int) -> list[int]:
    return [1, 2, 7, 64, max(1, num_tokens - 1), num_tokens + 1]


# ---- Exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_match_and_the_selection_is_their_stable_sort(dtype: torch.dtype, layout: str, shape: tuple) -> None:
    num_tokens = shape[2]
    for query_dtype in {torch.float32, dtype}:
        query, tokens = (LAYOUTS[layout](x) for x in sample_inputs(shape, dtype, query_dtype))
        logits, everything = ait.ops.bottleneck_select(query, tokens, num_tokens + 5)
        assert logits.dtype == reference.accumulate_dtype(dtype) and everything.dtype == torch.int64
        assert torch.equal(everything, torch.arange(num_tokens).expand(*shape[:2], -1))
        expected = torch.einsum("grd,tgd->grt", query.double(), tokens.double())
        assert_close(logits, expected, f"logits, query {query_dtype}")
        for mask in (None, random_mask(num_tokens)):
            stable_sort = StableSort(logits, mask)
            for k in ks_for(num_tokens):
                values, indices = ait.ops.bottleneck_select(query, tokens, k, mask)
                expected_values, expected_indices = stable_sort.first(k)
                assert torch.equal(indices, expected_indices), f"k = {k}"
                assert_same_bits(values, expected_values, f"values, k = {k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_where_the_logits_are_exact(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        query, tokens = ((2 * x).round().clamp(-8, 8) for x in sample_inputs(shape, dtype))
        for mask in (None, random_mask(shape[2])):
            for k in ks_for(shape[2]):
                actual = ait.ops.bottleneck_select(query, tokens, k, mask)
                expected = reference.bottleneck_select(query, tokens, k, mask)
                assert torch.equal(actual[1], expected[1]), (shape, k)
                assert torch.equal(actual[0], expected[0]), (shape, k)


def test_tokens_of_one_group_need_no_group_dimension() -> None:
    query, tokens = sample_inputs((1, 5, 300, 7))
    for actual, expected in zip(
        ait.ops.bottleneck_select(query, tokens[:, 0], 9), ait.ops.bottleneck_select(query, tokens, 9), strict=True
    ):
        assert_same_bits(actual, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    query, tokens = sample_inputs((2, 40, 200, 100), dtype)
    logits, _ = ait.ops.bottleneck_select(query, tokens, 200)
    for rows in ([0], [39], [5, 17, 33], list(range(1, 40))):
        for listed in ([0], [199], [3, 50, 51, 120], list(range(7, 180))):
            part, _ = ait.ops.bottleneck_select(query[:, rows], tokens[listed], len(listed))
            assert_same_bits(part, logits[:, rows][:, :, listed])
    alone, _ = ait.ops.bottleneck_select(query[1:], tokens[:, 1:], 200)
    assert_same_bits(alone, logits[1:])


@pytest.mark.parametrize("selection_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_dtype_rounds_both_operands(dtype: torch.dtype, selection_dtype: torch.dtype) -> None:
    for layout in LAYOUTS.values():
        query, tokens = (layout(x) for x in sample_inputs((2, 20, 150, 37), dtype, torch.float32))
        actual = ait.ops.bottleneck_select(query, tokens, 13, None, selection_dtype)
        # Rounded beforehand, and held where nothing more is lost.
        compute = reference.accumulate_dtype(dtype)
        rounded = [x.to(selection_dtype).to(compute) for x in (query, tokens)]
        if compute == torch.float32 and selection_dtype == torch.bfloat16 and bfloat16_products() != "none":
            # Other sums than those of float32: only close, and the selection is that of the logits themselves.
            logits, _ = ait.ops.bottleneck_select(query, tokens, 150, None, selection_dtype)
            assert_close(logits, ait.ops.bottleneck_select(*rounded, 150)[0], "logits")
            expected = StableSort(logits).first(13)
        else:
            expected = ait.ops.bottleneck_select(*rounded, 13)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


# ---- Ties and special values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 64, 500, 999])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 1e-45])
def test_of_equal_logits_the_first_are_kept(value: float, k: int) -> None:
    values, indices = select_logits([value] * 1000, k)
    assert indices.tolist() == list(range(k))
    torch.testing.assert_close(values, torch.full((k,), value), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kept_ties", [0, 1, 40, 99])
def test_of_many_equal_at_the_threshold_the_first_are_kept(kept_ties: int, dtype: torch.dtype) -> None:
    # 200 logits above, 2000 equal ones, 200 below, in a random order.
    above, below = torch.linspace(2, 3, 200), torch.linspace(-1, 0.5, 200)
    logits = torch.cat([above, torch.ones(2000), below])[torch.randperm(2400, generator=generator(kept_ties))]
    _, indices = select_logits(logits, 200 + kept_ties, dtype)
    ties = torch.nonzero(logits == 1).flatten()[:kept_ties]
    assert indices.tolist() == sorted(torch.nonzero(logits > 1).flatten().tolist() + ties.tolist())


def test_nan_comes_from_the_tokens_of_its_own_group_alone() -> None:
    query, tokens = sample_inputs((2, 20, 100, 9))
    tokens[50, 0] = math.nan
    _, indices = ait.ops.bottleneck_select(query, tokens, 1)
    assert (indices[0] == 50).all()
    tokens[:, 0] = 0
    _, expected = ait.ops.bottleneck_select(query, tokens, 1)
    assert torch.equal(indices[1], expected[1])


def test_rows_that_fill_up_a_panel_take_no_part() -> None:
    # Their query is zero, and zero times infinity is NaN, which passes every threshold.
    for rows in (1, 15, 17, 31, 33):
        query, tokens = torch.ones(1, rows, 1), torch.full((500, 1), math.inf)
        values, indices = ait.ops.bottleneck_select(query, tokens, 3)
        assert (values == math.inf).all() and (indices == torch.arange(3)).all()


# ---- Masks and extreme sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unmasked", [[], [0], [999], [3, 4, 500], list(range(100, 130))], ids=len)
def test_rows_with_fewer_candidates_end_in_padding(unmasked: list[int]) -> None:
    query, tokens = sample_inputs((2, 20, 1000, 6))
    mask = torch.ones(1000, dtype=torch.bool)
    mask[unmasked] = False
    values, indices = ait.ops.bottleneck_select(query, tokens, 30, mask)
    n = len(unmasked)
    assert (indices[..., :n] == torch.tensor(unmasked, dtype=torch.int64)).all()
    assert (indices[..., n:] == -1).all() and (values[..., n:] == -math.inf).all()
    assert values[..., :n].isfinite().all()


def test_masked_tokens_never_matter() -> None:
    query, tokens = sample_inputs((2, 20, 1000, 6))
    mask = random_mask(1000)
    expected = ait.ops.bottleneck_select(query, tokens, 30, mask)
    tokens[mask] = math.nan
    for a, e in zip(ait.ops.bottleneck_select(query, tokens, 30, mask), expected, strict=True):
        assert_same_bits(a, e)
    strided_mask = torch.stack([mask, ~mask], dim=1)[:, 0]
    for a, e in zip(ait.ops.bottleneck_select(query, tokens, 30, strided_mask), expected, strict=True):
        assert_same_bits(a, e)


def test_k_may_be_huge() -> None:
    query, tokens = sample_inputs((1, 3, 50, 4))
    for k in (50, 51, 2**31, 2**62, 2**63 - 1):
        values, indices = ait.ops.bottleneck_select(query, tokens, k)
        assert values.shape == (1, 3, 50) and torch.equal(indices[0, 0], torch.arange(50))


@needs_kernels
def test_expanded_inputs_are_fine() -> None:
    query, tokens = sample_inputs((1, 3, 50, 4))
    cases = (
        (query[:, :1].expand(1, 40, 4), tokens),
        (query, tokens[:1].expand(60, 1, 4)),
        (query[..., :1].expand(1, 3, 9), tokens[..., :1].expand(50, 1, 9)),
        (query.expand(3, 3, 4), tokens.expand(50, 3, 4)),
    )
    for views in cases:
        actual = ait.ops.bottleneck_select(*views, 11)
        expected = ait.ops.bottleneck_select(*(x.contiguous() for x in views), 11)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


# ---- With PyTorch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        query, tokens = sample_inputs((2, 5, 30, 8), dtype, torch.float32)
        inputs = query.requires_grad_(requires_grad), tokens.requires_grad_(requires_grad)
        for rest in ((4,), (40, random_mask(30)), (4, None, torch.bfloat16)):
            torch.library.opcheck(torch.ops.ait.bottleneck_select.default, (*inputs, *rest))


def test_the_result_has_no_gradient() -> None:
    query, tokens = (x.requires_grad_() for x in sample_inputs((1, 5, 30, 8)))
    values, indices = ait.ops.bottleneck_select(query, tokens, 4)
    assert not values.requires_grad and not indices.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode: type) -> None:
    query, tokens = sample_inputs((1, 40, 5000, 24))
    expected = ait.ops.bottleneck_select(query, tokens, 30)
    with mode(), num_threads(4):
        outputs = ait.ops.bottleneck_select(query.requires_grad_(), tokens.requires_grad_(), 30)
    for a, e in zip(outputs, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.slow
def test_compiled_equals_eager_with_dynamic_sizes() -> None:
    def select(query: Tensor, tokens: Tensor, k: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = ait.ops.bottleneck_select(query * 2, tokens, k, mask)
        return values * 2, indices + 1

    compiled = torch.compile(select, fullgraph=True, dynamic=True)
    for num_tokens, k in ((300, 9), (411, 23), (50, 77)):
        query, tokens = sample_inputs((1, 5, num_tokens, 8))
        args = query, tokens, k, random_mask(num_tokens)
        for actual, expected in zip(compiled(*args), select(*args), strict=True):
            assert_same_bits(actual, expected)


@needs_kernels
def test_the_expected_instruction_set_runs() -> None:
    common.assert_expected_instruction_set()


# ---- Abuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"query": torch.zeros(3)},
        {"query": torch.zeros(3, 8)},
        {"query": torch.zeros(2, 3, 7)},
        {"query": torch.zeros(3, 3, 8)},
        {"query": torch.zeros(2, 3, 8, 1)},
        {"query": torch.zeros(2, 3, 8, dtype=torch.int64)},
        {"query": torch.zeros(2, 3, 8, dtype=torch.float64)},
        {"query": torch.zeros(2, 3, 8, dtype=torch.complex64)},
        {"tokens": torch.zeros(20)},
        {"tokens": torch.zeros(20, 8)},
        {"tokens": torch.zeros(20, 2, 9)},
        {"tokens": torch.zeros(20, 3, 8)},
        {"tokens": torch.zeros(20, 2, 8, dtype=torch.int32)},
        {"tokens": torch.zeros(20, 2, 8, dtype=torch.float8_e4m3fn)},
        {"k": 0},
        {"k": -1},
        {"k": -(2**62)},
        {"mask": torch.zeros(19, dtype=torch.bool)},
        {"mask": torch.zeros(20, 1, dtype=torch.bool)},
        {"mask": torch.zeros(20, dtype=torch.uint8)},
        {"mask": torch.zeros(20)},
        {"selection_dtype": torch.float64},
        {"selection_dtype": torch.int32},
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(changes: dict) -> None:
    query, tokens = sample_inputs((2, 3, 20, 8))
    args = {"query": query, "tokens": tokens, "k": 5, "mask": None, "selection_dtype": None, **changes}
    with pytest.raises((ValueError, TypeError), match="bottleneck_select: expected"):
        ait.ops.bottleneck_select(**args)
    if not ait.ops._library.is_pure_python():
        with pytest.raises(RuntimeError, match="bottleneck_select: expected"):
            torch.ops.ait.bottleneck_select(**args)


@needs_kernels
def test_tensors_without_dense_memory_are_errors_or_meta_results() -> None:
    query, tokens = sample_inputs((2, 3, 20, 8))
    result = torch.ops.ait.bottleneck_select(query.to("meta"), tokens.to("meta"), 5)
    assert [tuple(x.shape) for x in result] == [(2, 3, 5)] * 2 and result[0].device.type == "meta"
    for bad in ((query.to_sparse(), tokens, 5), (query, tokens.to_sparse(), 5)):
        with pytest.raises(RuntimeError):
            torch.ops.ait.bottleneck_select(*bad)
    with pytest.raises(RuntimeError):
        torch.ops.ait.bottleneck_select(query, tokens, 5, torch.zeros(20, dtype=torch.bool).to_sparse())


@needs_kernels
def test_sizes_beyond_memory_are_errors() -> None:
    one = torch.zeros(1, 1, 1)
    for query, tokens, k in (
        (one, one.expand(2**40, 1, 1), 1),  # more tokens than an index holds
        (one.expand(1, 2**44, 1), one.expand(1000, 1, 1), 1000),
        (one.expand(1, 1, 2**44), one.expand(1, 1, 2**44), 1),
    ):
        with pytest.raises((RuntimeError, MemoryError)):
            torch.ops.ait.bottleneck_select(query, tokens, k)


@needs_kernels
def test_the_test_entry_checks_its_arguments() -> None:
    from ait import _C

    x = torch.zeros(4, 3).numpy()
    for args in (
        (x[0], x, 1, None, 1, 1),
        (x, x[:, :2], 1, None, 1, 1),
        (x, x, 0, None, 1, 1),
        (x, x, 1, x[0] > 0, 1, 1),
        (x, x, 1, None, 0, 1),
        (x, x, 1, None, 1, 0),
    ):
        with pytest.raises(ValueError):
            _C.bottleneck_select_tiled(*args)
