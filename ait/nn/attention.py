"""Multi-head self-attention, as the published models use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ait.ops._checks import check_positive_int, op_error


class Attention(nn.Module):
    """Self-attention over the tokens of each image: ``softmax(q k^T / sqrt(head_dim)) v`` per head, then a projection.

    ``qkv`` has no bias and its output is three chunks, query, key and value, with heads outermost in each; the
    output projection has a bias; there is no dropout. Both layers start as PyTorch initialises ``nn.Linear``.

    Args:
        dim: width ``E`` of a token.
        head_dim: width of a head, which must divide ``dim``; there are ``dim / head_dim`` heads.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: ``dim`` or ``head_dim`` is no positive integer, or ``head_dim`` does not divide ``dim``.

    Source: Dosovitskiy et al., arXiv 2010.11929, eq. 5-8, with the head width of arXiv 2309.12862.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("Attention", "dim", dim)
        check_positive_int("Attention", "head_dim", head_dim)
        if dim % head_dim:
            raise op_error("Attention", f"dim divisible by head_dim={head_dim}", dim)
        self.dim, self.head_dim, self.num_heads = dim, head_dim, dim // head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Attends.

        Args:
            x: ``(B, N, E)``, normalised by the block.

        Returns:
            ``(B, N, E)``, without the residual to ``x``.

        Raises:
            ValueError: ``x`` has another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise op_error("Attention", f"input of shape (B, N, {self.dim})", tuple(x.shape))
        batch, tokens, _ = x.shape
        # (B, N, 3E) -> (3, B, heads, N, head_dim)
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        pooled = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(pooled.transpose(1, 2).reshape(batch, tokens, self.dim))
        return out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
