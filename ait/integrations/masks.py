"""Which tokens of a host do not write into the memory: padding, and class or register tokens if so wished."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ait.ops._checks import op_error


class PaddingMask:
    """The padding mask of the forward pass that is under way, shared by all workspaces of a host.

    It belongs to a forward pass and not to the model: copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.current: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"current": None}


class TokenMask:
    """What a workspace is told about its tokens.

    Args:
        padding: padding mask of the host; None where there is no padding.
        prefix_tokens: the first so many tokens of each image, class and register tokens, do not write.
    """

    def __init__(self, padding: PaddingMask | None = None, prefix_tokens: int = 0) -> None:
        self.padding = padding
        self.prefix_tokens = prefix_tokens

    def of(self, tokens: Tensor) -> Tensor | None:
        """Mask for ``tokens (B, *, E)``: ``(B, *)`` bool, True = does not write; None where all may.

        Raises:
            ValueError: the host was given a padding mask of another shape.
        """
        mask = None if self.padding is None else self.padding.current
        if mask is not None:
            mask = self._fit(mask, tokens)
        if self.prefix_tokens and tokens.dim() == 3:
            prefix = torch.arange(tokens.shape[1], device=tokens.device) < self.prefix_tokens
            mask = prefix.expand(tokens.shape[:-1]) if mask is None else mask | prefix
        return mask

    def _fit(self, mask: Tensor, tokens: Tensor) -> Tensor | None:
        if tokens.dim() == 2:  # (T, E): the host has already dropped its padding.
            return None
        batch, length = tokens.shape[0], tokens.shape[1]
        # A longer mask begins with tokens of a cache or of a learned prefix, which are not among these.
        if tokens.dim() != 3 or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            expected = f"a padding mask of shape {tuple(tokens.shape[:-1])}, one entry a token"
            raise op_error("InsertedWorkspace", expected, tuple(mask.shape))
        return mask[:, mask.shape[1] - length :].to(device=tokens.device)
