"""The write: memory slots attend to the few tokens that matter most to them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ait.ops import bottleneck_attend, bottleneck_select
from ait.ops.reference import accumulate_dtype


class Write(NamedTuple):
    """What a batch would write. ``R = S*M`` rows, heads outermost; ``k`` tokens a row."""

    candidate: Tensor  # gamma_hat (M, D)
    gates: Tensor  # (R, k)
    indices: Tensor | None  # (R, k), -1 last; None where k is all tokens, in order


def attend_to_all(query: Tensor, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention, without a bottleneck: pooled tokens ``(R, E)`` and gates ``(R, T)``.

    Masked tokens take no part, whatever they hold; a row without any token gives zeros.
    """
    wide = tokens.to(accumulate_dtype(tokens.dtype))
    if mask is not None:
        wide = wide.masked_fill(mask.unsqueeze(-1), 0)
    logits_RT = query @ wide.T
    closed_RT = logits_RT.detach() == -math.inf
    if mask is not None:
        closed_RT = closed_RT | mask
    # Rows that are closed throughout go through the softmax as zeros, so that no 0 * NaN reaches a gradient.
    nothing_R1 = closed_RT.all(-1, keepdim=True)
    logits_RT = logits_RT.masked_fill(closed_RT, -math.inf).masked_fill(nothing_R1, 0)
    gates_RT = torch.softmax(logits_RT, dim=-1).masked_fill(closed_RT, 0)
    return gates_RT @ wide, gates_RT


class BottleneckWriter(nn.Module):
    """Bottleneck attention from slots to tokens, ``gamma_hat`` of the published equations.

    ``q . (X W_K)`` is ``(q W_K^T) . X`` and ``sum gate (X W_V)`` is ``(sum gate X) W_V``: rows ask the tokens
    directly, and values are projected after pooling, so neither keys nor values of all tokens are ever held.
    Where slots are so many that projected keys cost less (``M*E > D*E + M*D``), the selection alone uses them.

    Args:
        dim: token width ``E``.
        num_slots: ``M``.
        slot_dim: ``D``.
        num_heads: ``S``.
        dropout: probability with which an entry of the heads' answer is dropped in training.
        selection_dtype: see :func:`ait.ops.bottleneck_select`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int,
        slot_dim: int,
        num_heads: int,
        dropout: float,
        selection_dtype: torch.dtype | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = num_heads * slot_dim
        self.num_heads = num_heads
        self.slot_dim = slot_dim
        self.dropout = dropout
        self.selection_dtype = selection_dtype
        self.selects_on_keys = num_slots * dim > slot_dim * dim + num_slots * slot_dim
        self.query = nn.Linear(slot_dim, width, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(dim, width, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(dim, width, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(width, slot_dim, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(slot_dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, memory: Tensor, tokens: Tensor, mask: Tensor | None, k: int, training: bool) -> Write:
        """What ``tokens (T, E)`` would write into ``memory (M, D)``; computed in the memory's dtype."""
        pooled_RE, gates, indices = self.attend(self.ask(memory), tokens, mask, k)
        value_SDE = self.value.weight.to(memory.dtype).view(self.num_heads, self.slot_dim, -1)
        pooled_SME = pooled_RE.view(self.num_heads, memory.shape[0], -1)
        answer_MSD = torch.bmm(pooled_SME, value_SDE.transpose(1, 2)).transpose(0, 1)
        answer = F.linear(answer_MSD.flatten(1), self.out.weight.to(memory.dtype))
        answer = F.dropout(answer, self.dropout, training)
        weight, bias = self.norm.weight.to(memory.dtype), self.norm.bias.to(memory.dtype)
        candidate = F.layer_norm(answer + memory, self.norm.normalized_shape, weight, bias, self.norm.eps)
        return Write(candidate, gates, indices)

    def ask(self, memory: Tensor) -> Tensor:
        """Queries of all heads, ``(M, D) -> (S, M, D)``, scaled by ``1 / sqrt(D)``."""
        query = F.linear(memory * self.slot_dim**-0.5, self.query.weight.to(memory.dtype))
        return query.view(-1, self.num_heads, self.slot_dim).transpose(0, 1)

    def attend(
        self, query_SMD: Tensor, tokens: Tensor, mask: Tensor | None, k: int, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pooled tokens ``(R, E)``, gates and indices of the ``k`` tokens that each row lets in, if not given."""
        key_SDE = self.key.weight.to(query_SMD.dtype).view(self.num_heads, self.slot_dim, -1)
        absorbed_RE = torch.bmm(query_SMD, key_SDE).flatten(0, 1)
        if k >= tokens.shape[0]:
            return *attend_to_all(absorbed_RE, tokens, mask), None
        if indices is None:
            indices = self.select(query_SMD, absorbed_RE, tokens, mask, k)
        pooled_RE, gates_Rk, _ = bottleneck_attend(absorbed_RE, tokens, indices)
        return pooled_RE, gates_Rk, indices

    @torch.no_grad()
    def select(self, query_SMD: Tensor, absorbed_RE: Tensor, tokens: Tensor, mask: Tensor | None, k: int) -> Tensor:
        """Indices ``(R, k)`` of the tokens with the largest logits."""
        if self.selects_on_keys:
            keys = F.linear(tokens.to(query_SMD.dtype), self.key.weight.to(query_SMD.dtype))
            keys_TSD = keys.view(-1, self.num_heads, self.slot_dim)
            indices = bottleneck_select(query_SMD.contiguous(), keys_TSD, k, mask, self.selection_dtype)[1]
            return indices.flatten(0, 1)
        return bottleneck_select(absorbed_RE.unsqueeze(0), tokens, k, mask, self.selection_dtype)[1].squeeze(0)
