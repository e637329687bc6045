"""bottleneck_select: exactness, ties, special values, determinism and abuse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ait
from ait.ops import reference
from tests.ops import common
from tests.ops.common import DTYPES, LAYOUTS, THREADS, assert_same_bits, generator, needs_kernels, num_threads
from tests.tolerances import assert_close

HALVES = (torch.bfloat16, torch.float16)

# (G groups, R rows, T tokens, d width): whole and broken panels of rows, steps of tokens and vectors of elements,
# lists that overflow many times, a stride of 2 KiB, one of everything, and nothing of each.
SHAPES = [
    (1, 5, 300, 7),
    (3, 16, 100, 33),
    (1, 33, 1000, 16),
    (2, 70, 257, 64),
    (1, 300, 63, 5),
    (1, 2, 40, 512),
    (1, 1, 3000, 3),
    (5, 1, 14, 1),
    (1, 1, 1, 1),
    (0, 3, 9, 4),
    (2, 0, 9, 4),
    (2, 3, 0, 4),
    (2, 3, 9, 0),
]


def sample_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, query_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    groups, rows, tokens, width = shape
    g = generator(groups + rows + tokens)
    query = torch.randn(groups, rows, width, generator=g, dtype=torch.float64)
    values = torch.randn(tokens, groups, width, generator=g, dtype=torch.float64)
    return query.to(query_dtype or dtype), values.to(dtype)


def random_mask(num_tokens: int, share: float = 0.4) -> Tensor:
    return torch.rand(num_tokens, generator=generator(num_tokens)) < share


def first_of_stable_sort(logits_GRT: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What selection from these logits must give: the definition, without a product."""
    groups, rows, num_tokens = logits_GRT.shape
    one_row_a_group = logits_GRT.new_ones(groups * rows, 1, 1)
    tokens = logits_GRT.flatten(0, 1).T.reshape(num_tokens, groups * rows, 1)
    values, indices = reference.bottleneck_select(one_row_a_group, tokens, k, mask)
    return values.view(groups, rows, min(k, num_tokens)), indices.view(groups, rows, min(k, num_tokens))


def select_logits(logits: list[float] | Tensor, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Selection from given logits: 20 rows of width 1 that all ask 1."""
    tokens = torch.as_tensor(logits, dtype=dtype)[:, None]
    values, indices = ait.ops.bottleneck_select(torch.ones(1, 20, 1, dtype=dtype), tokens, k)
    for row in range(1, 20):
        assert_same_bits(values[0, row], values[0, 0])
        assert_same_bits(indices[0, row], indices[0, 0])
    return values[0, 0], indices[0, 0]


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
            for k in ks_for(num_tokens):
                values, indices = ait.ops.bottleneck_select(query, tokens, k, mask)
                expected_values, expected_indices = first_of_stable_sort(logits, k, mask)
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


def bit_patterns(n: int) -> Tensor:
    """Random floats over all exponents, denormals, infinities and NaNs of every payload included."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator(n)).to(torch.int32)
    return bits.view(torch.float32)


ADVERSARIES: dict[str, Tensor] = {
    "ascending": torch.arange(3000.0),
    "descending": -torch.arange(3000.0),
    "ascending by the last bit": torch.arange(3000, dtype=torch.int32).add(0x3F800000).view(torch.float32),
    "up and down": torch.arange(3000.0) * (1 - 2 * (torch.arange(3000) % 2)),
    "one giant": torch.zeros(3000).index_fill_(0, torch.tensor(1700), 3e38),
    "one giant at the end": torch.randn(3000, generator=generator(1)).index_fill_(0, torch.tensor(2999), 3e38),
    "denormals": torch.randint(-4, 5, (3000,), generator=generator(2)).to(torch.float32) * 1e-45,
    "signed zeros": torch.where(torch.rand(3000, generator=generator(3)) < 0.5, 0.0, -0.0),
    "all bit patterns": bit_patterns(3000),
    "few values": torch.randint(0, 3, (3000,), generator=generator(4)).to(torch.float32),
    "mostly NaN": torch.where(torch.rand(3000, generator=generator(5)) < 0.9, math.nan, 1.0),
    "mostly -inf": torch.where(torch.rand(3000, generator=generator(6)) < 0.99, -math.inf, 1.0),
    "infinities and NaN": torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0]).repeat(500),
    "NaN payloads": torch.randint(-(2**22), 2**22, (3000,), generator=generator(7)).to(torch.int32).view(torch.float32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_logits(name: str, dtype: torch.dtype) -> None:
    logits = ADVERSARIES[name].to(dtype)
    for k in (1, 2, 63, 64, 65, 700, 1500, 2999):
        order = torch.sort(logits, descending=True, stable=True).indices[:k]
        values, indices = select_logits(logits, k, dtype)
        assert torch.equal(indices, order.sort().values), f"k = {k}"
        torch.testing.assert_close(values, logits[indices], rtol=0, atol=0, equal_nan=True)


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
    taken = {}
    with num_threads(4):
        for name, call in {
            "select_calls": lambda: ait.ops.bottleneck_select(query, tokens, 4096),
            "select_list_cuts": lambda: ait.ops.bottleneck_select(query, tokens, 8),
            "select_tiles_in_place": lambda: ait.ops.bottleneck_select(query, tokens, 8),
            "select_tiles_copied": lambda: ait.ops.bottleneck_select(query, tokens.bfloat16(), 8),
            "select_masked_calls": lambda: ait.ops.bottleneck_select(query, tokens, 8, random_mask(4096)),
            "select_split_rows": lambda: ait.ops.bottleneck_select(query[:, :1], tokens, 8),
        }.items():
            _C.reset_path_counters()
            assert _C.path_counters()[name] == 0
            call()
            taken[name] = _C.path_counters()[name]
        _C.reset_path_counters()
        ait.ops.bottleneck_select(query, tokens, 8)
        tasks = _C.path_counters()["select_tasks"]
    assert all(taken.values()), taken
    assert tasks >= 2


@needs_kernels
def test_the_matrix_of_all_logits_is_never_held() -> None:
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory starts anew
    except OSError:
        pytest.skip("needs Linux's /proc/self/clear_refs")

    def kib(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    query, tokens = torch.randn(1, 1024, 2), torch.randn(100_000, 2)
    before = kib("VmRSS")
    ait.ops.bottleneck_select(query, tokens, 16)
    assert kib("VmHWM") - before < 100 * 1024  # the logits alone would be 390 MiB


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
    with mode():
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
@pytest.mark.parametrize("capability", common.lesser_capabilities())
def test_lesser_instruction_sets(capability: str) -> None:
    expression = "float32-strided or exact or neighbours or rounds or ties or adversarial or tile or padding"
    common.run_tests_at_capability(str(Path(__file__).relative_to(common.ROOT)), capability, expression)


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
