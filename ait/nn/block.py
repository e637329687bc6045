"""The pre-norm Transformer block, and the ordinary MLP that the workspace layer replaces in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ait.ops._checks import check_positive_int


class Mlp(nn.Module):
    """``fc2(GELU(fc1(x)))``, for each token alone; both layers with bias, exact GELU, no dropout.

    Args:
        dim: width ``E`` of a token.
        hidden_dim: width between the layers; ``4 * dim`` by default.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: a width is no positive integer.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("Mlp", "dim", dim)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_positive_int("Mlp", "hidden_dim", hidden_dim)
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., E)`` to ``(..., E)``, without the residual to ``x``."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm block: ``x <- x + attn(LN(x))``, then ``x <- x + mlp(LN(x))``; LayerNorm eps 1e-5.

    The two slots take any module that maps ``(B, N, E)`` to the same shape and adds no residual of its own.

    Args:
        dim: width ``E`` of a token.
        attn: what mixes the tokens of an image, such as :class:`~ait.nn.attention.Attention`; None leaves the
            first step out, with its LayerNorm.
        mlp: :class:`Mlp` in a ViT, :class:`~ait.nn.workspace.GlobalWorkspaceLayer` in an AiT.
        device: device of the LayerNorms.
        dtype: dtype of the LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module | None,
        mlp: nn.Module,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = None if attn is None else nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, E)`` to ``(B, N, E)``."""
        if self.attn is not None and self.norm1 is not None:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
