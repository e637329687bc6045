"""Inputs and the oracle that the tests of bottleneck_select share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ait
from ait.ops._library import is_pure_python
from tests.ops.common import assert_same_bits, generator

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


class StableSort:
    """What selection from given logits must give: the first of a stable descending sort, which is done once for all k.

    PyTorch's sort puts NaN, of which all count as one value, before everything else.
    """

    def __init__(self, logits_GRT: Tensor, mask: Tensor | None = None) -> None:
        self.logits = logits_GRT
        num_tokens = logits_GRT.shape[-1]
        unmasked = torch.arange(num_tokens) if mask is None else torch.nonzero(~mask).squeeze(1)
        self.order = unmasked[torch.sort(logits_GRT[..., unmasked], dim=-1, descending=True, stable=True).indices]

    def first(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices ``(G, R, min(k, T))``, ascending in the index; -inf and -1 where there are too few."""
        width = min(k, self.logits.shape[-1])
        best = self.order[..., :width]
        chosen = torch.zeros(self.logits.shape, dtype=torch.bool).scatter_(-1, best, True)
        indices = torch.nonzero(chosen)[:, -1].view(best.shape)
        padding = (0, width - best.shape[-1])
        values = torch.nn.functional.pad(self.logits.gather(-1, indices), padding, value=-math.inf)
        return values, torch.nn.functional.pad(indices, padding, value=-1)


def select_logits(logits: list[float] | Tensor, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Selection from given logits: 20 rows of width 1 that all ask 1."""
    tokens = torch.as_tensor(logits, dtype=dtype)[:, None]
    values, indices = ait.ops.bottleneck_select(torch.ones(1, 20, 1, dtype=dtype), tokens, k)
    for row in range(1, 20):
        assert_same_bits(values[0, row], values[0, 0])
        assert_same_bits(indices[0, row], indices[0, 0])
    return values[0, 0], indices[0, 0]


def bfloat16_products() -> str:
    """The instructions that multiply bfloat16 where ``selection_dtype`` asks for it, or "none": float32 then."""
    if is_pure_python():
        return "none"
    from ait import _C

    return _C.bfloat16_products()
