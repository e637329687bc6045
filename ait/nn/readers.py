"""The read: how tokens get the memory back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ait.ops import hopfield_retrieve


class HopfieldReader(nn.Module):
    """Continuous Hopfield retrieval: tokens settle on patterns ``P = gamma W_LT + b``.

    Args:
        dim: token width ``E``.
        slot_dim: slot width ``D``.
        beta: inverse temperature.
        steps: the most update steps.
        tol: a token stops after the first step that moves it by less in L2 norm; 0 never stops.

    Source: Ramsauer et al., Hopfield Networks is All You Need, arXiv 2008.02217, eq. 3.
    """

    def __init__(
        self,
        dim: int,
        slot_dim: int,
        *,
        beta: float = 1.0,
        steps: int = 1,
        tol: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.steps = steps
        self.tol = tol
        self.proj = nn.Linear(slot_dim, dim, device=device, dtype=dtype)

    def patterns(self, memory: Tensor) -> Tensor:
        """``(M, D) -> (M, E)``, in the memory's dtype."""
        return F.linear(memory, self.proj.weight.to(memory.dtype), self.proj.bias.to(memory.dtype))

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """``tokens (T, E)`` and ``memory (M, D)`` to ``(T, E)``, in the dtype of the tokens."""
        return hopfield_retrieve(tokens, self.patterns(memory), self.beta, self.steps, self.tol)[0]

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, steps={self.steps}, tol={self.tol:g}"


class AttentionReader(nn.Module):
    """Multi-head attention from tokens to slots: the ablation of Hopfield retrieval.

    Args:
        dim: token width ``E``.
        slot_dim: slot width ``D``, and the width of a head.
        num_heads: ``S``.
    """

    def __init__(
        self,
        dim: int,
        slot_dim: int,
        *,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = num_heads * slot_dim
        self.num_heads = num_heads
        self.query = nn.Linear(dim, width, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(slot_dim, width, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(slot_dim, width, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(width, dim, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """``tokens (T, E)`` and ``memory (M, D)`` to ``(T, E)``, in the dtype of the tokens."""
        query = F.linear(tokens, self.query.weight.to(tokens.dtype))
        key = F.linear(memory, self.key.weight.to(memory.dtype)).to(tokens.dtype)
        value = F.linear(memory, self.value.weight.to(memory.dtype)).to(tokens.dtype)
        # One sequence of T tokens: (1, S, T or M, D).
        heads = (x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        read = F.scaled_dot_product_attention(*heads).squeeze(0).transpose(0, 1).flatten(1)
        return F.linear(read, self.out.weight.to(tokens.dtype), self.out.bias.to(tokens.dtype))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
