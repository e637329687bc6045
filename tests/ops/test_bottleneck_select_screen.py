"""bottleneck_select in float32 behind products of bfloat16: what these let through, and that nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ait
from tests.ops.bottleneck_select_inputs import StableSort, bfloat16_products, random_mask, sample_inputs
from tests.ops.common import THREADS, assert_same_bits, generator, num_threads
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bfloat16_products() != "amx_bf16", reason="needs a processor whose tiles multiply bfloat16"),
]


def screened(
    query: Tensor, tokens: Tensor, k: int, mask: Tensor | None = None, tile: int = 32, ranges: int = 1
) -> tuple[Tensor, Tensor]:
    """Selection for ``query (R, d)`` among ``tokens (T, d)``, whatever their shape."""
    from ait import _C

    numpy_mask = None if mask is None else mask.numpy()
    arrays = _C.bottleneck_select_tiled(query.numpy(), tokens.numpy(), k, numpy_mask, tile, ranges, screened=True)
    values, indices = (torch.from_numpy(x) for x in arrays)
    return values, indices


def counted(call: Callable[[], object]) -> dict[str, int]:
    from ait import _C

    _C.reset_path_counters()
    call()
    return _C.path_counters()


def assert_is_stable_sort(query: Tensor, tokens: Tensor, name: str) -> None:
    """Of the logits that are computed where all are selected, so that none is screened off."""
    num_tokens = len(tokens)
    logits, _ = screened(query, tokens, num_tokens)
    for mask in (None, random_mask(num_tokens)):
        stable_sort = StableSort(logits[None], mask)
        for k in (1, 7, 40, num_tokens // 2):
            for tile, ranges in ((32, 1), (1, 3), (77, 2), (4096, 1)):
                actual = screened(query, tokens, k, mask, tile, ranges)
                for a, e in zip(actual, stable_sort.first(k), strict=True):
                    assert_same_bits(a, e[0], f"{name}, k = {k}, tile = {tile}, {ranges} ranges")


@pytest.mark.parametrize(
    "shape", [(70, 1500, 64), (33, 900, 77), (5, 1200, 16), (100, 1400, 1), (16, 700, 300)], ids=str
)
def test_the_selection_is_the_stable_sort_of_logits_in_float32(shape: tuple[int, int, int]) -> None:
    rows, num_tokens, width = shape
    query, tokens = sample_inputs((1, rows, num_tokens, width))
    query, tokens = query[0], tokens[:, 0]
    logits, _ = screened(query, tokens, num_tokens)
    assert_close(logits, query.double() @ tokens.double().T, "logits")
    assert_is_stable_sort(query, tokens, "normal")
    assert_is_stable_sort(query.round(), tokens.round(), "ties")


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


def any_magnitude(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from the subnormal to the largest, of both signs."""
    exponents = uniform(*shape, seed=seed) * 250 - 140
    return (2 * uniform(*shape, seed=seed + 1) - 1) * torch.exp2(exponents.double()).float()


def worst_token_roundings() -> tuple[Tensor, Tensor]:
    """Tokens in the middle between two of bfloat16, all of whose elements are rounded down: in bfloat16 a little less
    than the others, in float32 a little more. A bound that is a twentieth too tight loses them."""
    query, tokens = torch.ones(70, 64), torch.ones(1000, 64)
    tokens[:, 0] += 31 / 128  # of bfloat16, and 64 + 31 / 128 the logit
    tokens[50::100] = 1 + 2**-8  # the logit 64 + 32 / 128, in bfloat16 64
    return query, tokens


def worst_query_roundings() -> tuple[Tensor, Tensor]:
    """The same of the query: all logits are off by as much as can be, and the largest differ less than that."""
    query, tokens = torch.full((70, 64), 1 + 2**-8), torch.ones(1000, 64)
    tokens[50::100, 0] += 1 / 128
    return query, tokens


def smallest_query() -> tuple[Tensor, Tensor]:
    """Two elements of the smallest number each: of their length, 1.4 times that, only 1 is left when it is rounded."""
    query, tokens = torch.zeros(70, 64), torch.zeros(1000, 64)
    query[:, :2] = 2**-149
    tokens[:, :2] = 2**62 * (1 + 0.3 * uniform(1000, 1))
    return query, tokens


def smallest_tokens() -> tuple[Tensor, Tensor]:
    """The same of a few tokens, whose logits are 1.75 times as large as one unit; those of the others are 1.5."""
    query, tokens = torch.zeros(70, 64), torch.zeros(1000, 64)
    query[:, :3] = torch.tensor([1, 0.75, 0.75]) * 2.0**120
    tokens[:, 2] = 2 * 2**-149
    tokens[50::100, :3] = torch.tensor([1.0, 1.0, 0.0]) * 2**-149
    return query, tokens


def scaled(name: str, query_exponent: int, token_exponent: int) -> tuple[Tensor, Tensor]:
    query, tokens = ADVERSARIES[name]()
    return query * 2.0**query_exponent, tokens * 2.0**token_exponent


def same_sums() -> tuple[Tensor, Tensor]:
    """Numbers of bfloat16 whose sum would be the same for all tokens, were it not rounded on the way."""
    elements = sample_inputs((1, 1, 1, 300))[0].flatten() * torch.exp2((20 * uniform(300)).round())
    elements = elements.bfloat16().float()
    order = uniform(1000, 300).argsort(-1)
    return torch.ones(70, 300), elements[order]


ADVERSARIES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "worst roundings of tokens": worst_token_roundings,
    "worst roundings of the query": worst_query_roundings,
    "worst roundings of tokens, below the normal range": lambda: scaled("worst roundings of tokens", 120, -126),
    "worst roundings of the query, below the normal range": lambda: scaled("worst roundings of the query", -126, 50),
    "sums that differ in their roundings": same_sums,
    "all equal": lambda: (torch.ones(70, 64), torch.ones(1000, 64)),
    "zeros": lambda: (sample_inputs((1, 70, 1, 64))[0][0], torch.zeros(1000, 64)),
    "a query of zeros": lambda: (torch.zeros(70, 64), sample_inputs((1, 1, 1000, 64))[1][:, 0]),
    "alike but for the last bits": lambda: (
        torch.ones(70, 64),
        1 + (uniform(1000, 64) * 64).round() * 2**-23,
    ),
    "ascending": lambda: (torch.ones(70, 64), torch.arange(1000.0)[:, None].expand(1000, 64).contiguous()),
    "descending": lambda: (torch.ones(70, 64), -torch.arange(1000.0)[:, None].expand(1000, 64).contiguous()),
    "tiny": lambda: (uniform(70, 64) - 0.5, (uniform(1000, 64) - 0.5) * 1e-25),
    "logits below the normal range": lambda: ((uniform(70, 64) - 0.5) * 1e-20, (uniform(1000, 64) - 0.5) * 1e-19),
    "a query of the smallest numbers": smallest_query,
    "tokens of the smallest numbers": smallest_tokens,
    "subnormal tokens": lambda: (uniform(70, 64) - 0.5, (uniform(1000, 64) - 0.5) * 1e-38),
    "subnormal query, large tokens": lambda: ((uniform(70, 64) - 0.5) * 1e-38, (uniform(1000, 64) - 0.5) * 1e15),
    "huge query, subnormal tokens": lambda: ((uniform(70, 64) - 0.5) * 1e37, (uniform(1000, 64) - 0.5) * 1e-38),
    "huge": lambda: ((uniform(70, 64) - 0.5) * 1e20, (uniform(1000, 64) - 0.5) * 1e19),
    "any magnitude": lambda: (any_magnitude(70, 64), any_magnitude(1000, 64, seed=5)),
    "one giant element": lambda: (
        uniform(70, 64) - 0.5,
        torch.cat([uniform(1000, 63, seed=1) - 0.5, 1e30 * torch.ones(1000, 1)], 1),
    ),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_nothing_is_screened_off_that_could_be_selected(name: str) -> None:
    query, tokens = ADVERSARIES[name]()
    assert_is_stable_sort(query, tokens, name)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
def test_special_values(special: float) -> None:
    query, tokens = sample_inputs((1, 70, 1000, 64))
    query, tokens = query[0], tokens[:, 0]
    in_tokens, in_query = tokens.clone(), query.clone()
    in_tokens[::90, 5] = special
    in_query[::9, 7] = special
    assert_is_stable_sort(query, in_tokens, "tokens")
    assert_is_stable_sort(in_query, tokens, "query")
    assert_is_stable_sort(in_query, in_tokens, "both")


def test_flushing_subnormal_numbers_loses_nothing() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that can flush subnormal numbers")
    try:
        for name, adversary in ADVERSARIES.items():
            assert_is_stable_sort(*adversary(), name)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operator_screens_where_few_are_selected(dtype: torch.dtype) -> None:
    groups, rows, num_tokens, width, k = 2, 70, 5000, 96, 60
    query, tokens = sample_inputs((groups, rows, num_tokens, width), dtype, torch.float32)
    wide = torch.empty(num_tokens, groups, width + 3, dtype=dtype)
    wide[..., :width] = tokens
    for mask in (None, random_mask(num_tokens)):
        for layout in (tokens, wide[..., :width]):
            for threads in THREADS:
                with num_threads(threads):
                    result: list[Tensor] = []
                    call = lambda: result.extend(ait.ops.bottleneck_select(query, layout, k, mask))  # noqa: B023,E731
                    counters = counted(call)
                assert counters["select_screened_calls"] == 1
                assert 0 < counters["select_logits_let_through"] < 0.2 * groups * rows * num_tokens
                for group in range(groups):
                    own = tokens[:, group].float().contiguous()
                    expected = screened(query[group].float().contiguous(), own, k, mask)
                    for actual, e in zip(result, expected, strict=True):
                        assert_same_bits(actual[group], e, f"group {group}, {threads} threads")


@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 63, 5000, 96), 60), ((1, 70, 5000, 63), 60), ((1, 70, 5000, 96), 105), ((1, 70, 2047, 96), 1)],
    ids=str,
)
def test_the_operator_does_not_screen_where_it_does_not_pay(shape: tuple[int, int, int, int], k: int) -> None:
    query, tokens = sample_inputs(shape)
    assert counted(lambda: ait.ops.bottleneck_select(query, tokens, k))["select_screened_calls"] == 0


def test_only_float32_is_screened() -> None:
    query, tokens = sample_inputs((1, 70, 5000, 96))
    calls = {
        "float64": lambda: ait.ops.bottleneck_select(query.double(), tokens.double(), 60),
        "rounded to float16": lambda: ait.ops.bottleneck_select(query, tokens, 60, None, torch.float16),
        "bfloat16 asked for": lambda: ait.ops.bottleneck_select(query, tokens, 60, None, torch.bfloat16),
    }
    for name, call in calls.items():
        assert counted(call)["select_screened_calls"] == 0, name
    assert counted(lambda: ait.ops.bottleneck_select(query, tokens, 60, None, torch.float32))["select_screened_calls"]


def test_paths_that_were_taken() -> None:
    query, tokens = sample_inputs((1, 70, 8000, 96))
    normal = counted(lambda: ait.ops.bottleneck_select(query, tokens, 60))
    assert normal["select_crowded_tiles"] == 0
    # After a first threshold from a sample, about k log(T / sample) more than the k of the sample pass.
    assert 70 * 60 * 2 < normal["select_logits_let_through"] < 70 * 60 * 6
    equal = counted(lambda: ait.ops.bottleneck_select(query, torch.ones_like(tokens), 60))
    assert equal["select_crowded_tiles"] == 8000 // 224 + 1  # tiles of 224 tokens
    assert equal["select_logits_let_through"] == 70 * 8000
    nothing = counted(lambda: ait.ops.bottleneck_select(query, torch.full_like(tokens, math.nan), 60))
    assert nothing["select_closed_rows"] == 70
    assert nothing["select_logits_let_through"] == 70 * 224  # those of one tile


def test_bad_input() -> None:
    for width in (0, (1 << 16) + 1):
        with pytest.raises(ValueError, match="cannot be screened"):
            screened(torch.ones(2, width), torch.ones(3, width), 1)
