"""bottleneck_select on logits that are hard on a selection: every index set is that of a stable descending sort."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ait
from tests.ops.bottleneck_select_inputs import select_logits
from tests.ops.common import generator, num_threads

pytestmark = pytest.mark.usefixtures("one_thread")


def bit_patterns(*shape: int) -> Tensor:
    """Random floats over all exponents, denormals, infinities and NaNs of every payload included."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator(shape[-1])).to(torch.int32)
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


@pytest.mark.parametrize("rows", [84, 96])
@pytest.mark.parametrize("k", [1, 64, 700])
def test_adversaries_side_by_side(k: int, rows: int) -> None:
    # Some rows are closed by NaNs, others are let into all the time, and each at tokens of its own.
    logits_RT = torch.stack([*ADVERSARIES.values()]).repeat(7, 1)[:rows]
    for row in range(rows):
        logits_RT[row] = logits_RT[row].roll(31 * row)
    values, indices = ait.ops.bottleneck_select(torch.ones(rows, 1, 1), logits_RT.T.contiguous().unsqueeze(-1), k)
    assert_stable_sort(values[:, 0], indices[:, 0], logits_RT, k)


# ---- A million rows -------------------------------------------------------------------------------------------------

# Fewer where the same tests run again for a lesser instruction set.
ROWS = 8192 if "AIT_TEST_CAPABILITY" in os.environ else 49152


def random(rows: int, num_tokens: int) -> Tensor:
    return torch.rand(rows, num_tokens, generator=generator(rows + num_tokens))


def choice(rows: int, num_tokens: int, *values: float) -> Tensor:
    picked = torch.randint(len(values), (rows, num_tokens), generator=generator(rows * len(values)))
    return torch.tensor(values)[picked]


def one_giant(rows: int, num_tokens: int) -> Tensor:
    logits = torch.zeros(rows, num_tokens)
    return logits.scatter_(1, torch.randint(num_tokens, (rows, 1), generator=generator(rows)), 1e30)


def nan_payloads(rows: int, num_tokens: int) -> Tensor:
    """NaNs of both signs with random payloads, and some numbers between them."""
    payload = torch.randint(1, 2**23, (rows, num_tokens), generator=generator(rows)).to(torch.int32)
    sign = choice(rows, num_tokens, 0, -(2**31)).to(torch.int32)
    numbers = choice(rows, num_tokens, 1.0, -math.inf, math.inf, 0.0)
    return torch.where(random(rows, num_tokens) < 0.4, numbers, (payload | 0x7F800000 | sign).view(torch.float32))


# Each gives logits (R, T).
DISTRIBUTIONS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda r, t: torch.randn(r, t, generator=generator(r + t)),
    "all equal": lambda r, t: random(r, 1).expand(r, t),
    "equal high bits": lambda r, t: 1 + random(r, t) * 2**-18,
    "ascending": lambda r, t: random(r, t).cumsum(1),
    "descending": lambda r, t: -random(r, t).cumsum(1),
    "ascending by octaves": lambda r, t: torch.ldexp(random(r, t) + 1, torch.arange(t) * 200 // t - 100),
    "one giant": one_giant,
    "denormals": lambda r, t: choice(r, t, *(i * 1e-45 for i in range(-8, 9))),
    "signed zeros": lambda r, t: choice(r, t, 0.0, -0.0),
    "infinities": lambda r, t: choice(r, t, math.inf, -math.inf, 1.0, -1.0),
    "NaN payloads": nan_payloads,
    "all bit patterns": bit_patterns,
}


def assert_stable_sort(values: Tensor, indices: Tensor, logits: Tensor, k: int) -> None:
    expected = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
    assert torch.equal(indices, expected)
    torch.testing.assert_close(values, logits.gather(-1, indices), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [3, 30])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_million_rows_side_by_side(name: str, k: int) -> None:
    # 12 distributions of 49,152 rows, twice; lists of k + 64 entries are cut at least once.
    logits_RT = DISTRIBUTIONS[name](ROWS, 120)
    query, tokens = torch.ones(len(logits_RT), 1, 1), logits_RT.T.contiguous().unsqueeze(-1)
    values, indices = ait.ops.bottleneck_select(query, tokens, k)
    assert_stable_sort(values[:, 0], indices[:, 0], logits_RT, k)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_many_groups_of_two_rows(name: str) -> None:
    # The second row asks for the opposite: its logits are those of the first with their signs changed.
    logits_GT = DISTRIBUTIONS[name](ROWS // 8, 120)
    query = torch.tensor([1.0, -1.0]).view(1, 2, 1).expand(len(logits_GT), 2, 1)
    values, indices = ait.ops.bottleneck_select(query, logits_GT.T.unsqueeze(-1), 7)
    assert_stable_sort(values, indices, torch.stack([logits_GT, -logits_GT], dim=1), 7)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_long_rows(name: str) -> None:
    logits_RT = DISTRIBUTIONS[name](20, 20_000)
    query, tokens = torch.ones(20, 1, 1), logits_RT.T.unsqueeze(-1)
    for threads in (1, 3):
        for k in (1, 512, 6000):
            with num_threads(threads):
                values, indices = ait.ops.bottleneck_select(query, tokens, k)
                assert_stable_sort(values[:, 0], indices[:, 0], logits_RT, k)
                values, indices = ait.ops.bottleneck_select(query[:1], tokens[:, :1], k)
                assert_stable_sort(values[0], indices[0], logits_RT[:1], k)
