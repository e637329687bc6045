"""Which tokens of a host do not write into the memory: padding, and class or register tokens if so wished."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ait.ops._checks import op_error


class PaddingMask:
    """The padding mask of the forward pass that is under way, shared by all workspaces of a host.

    Its methods are hooks of the module that is told about padding. The mask belongs to a forward pass and not to the
    model: copies and pickles are without one.

    Args:
        argument: name of the argument of ``forward`` that is 0 or False where a token is padding.
        position: where it stands if it comes without its name.
    """

    def __init__(self, argument: str, position: int) -> None:
        self.argument = argument
        self.position = position
        self.current: Any = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        valid = kwargs.get(self.argument)
        if valid is None and len(args) > self.position:
            valid = args[self.position]
        if valid is None and args and isinstance(args[0], dict):
            valid = args[0].get(self.argument)
        self.current = valid == 0 if isinstance(valid, Tensor) else valid

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        self.current = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None}


class TokenMask:
    """What a workspace is told about its tokens.

    Args:
        padding: padding mask of the host; None where there is no padding.
        prefix_tokens: class and register tokens, the first ones of each image.
        prefix_writes: whether they write; if not, they only read.
    """

    def __init__(
        self, padding: PaddingMask | None = None, prefix_tokens: int = 0, *, prefix_writes: bool = True
    ) -> None:
        self.padding = padding
        self.prefix_tokens = prefix_tokens
        self.prefix_writes = prefix_writes

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenMask:
        # A workspace that is copied without its host (as peft does) stays in it and needs the host's own mask. Copied
        # with it, the host comes first.
        padding = memo.get(id(self.padding), self.padding)
        return TokenMask(padding, self.prefix_tokens, prefix_writes=self.prefix_writes)

    def of(self, tokens: Tensor) -> Tensor | None:
        """Mask for ``tokens (B, *, E)``: ``(B, *)`` bool, True = does not write; None where all may.

        Raises:
            ValueError: the host was given a padding mask of another shape, or its tokens are no sequence that is
                longer than a prefix that does not write.
        """
        mask = None if self.padding is None else self.padding.current
        if mask is not None:
            mask = self._fit(mask, tokens)
        if not self.prefix_writes and self.prefix_tokens:
            if tokens.dim() != 3 or tokens.shape[1] <= self.prefix_tokens:
                expected = f"tokens (B, N, E), more than the {self.prefix_tokens} of prefix_tokens"
                raise op_error("InsertedWorkspace", expected, tuple(tokens.shape))
            prefix = torch.arange(tokens.shape[1], device=tokens.device) < self.prefix_tokens
            mask = prefix.expand(tokens.shape[:-1]) if mask is None else mask | prefix
        return mask

    def _fit(self, mask: Any, tokens: Tensor) -> Tensor | None:
        if tokens.dim() == 2:  # (T, E): the host has already dropped its padding
            return None
        batch, length = tokens.shape[0], tokens.shape[1]
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else (type(mask).__name__,)
        if len(shape) == 2 and tokens.dim() == 3 and shape[0] == batch:
            if shape[1] == length - self.prefix_tokens:  # one entry a patch
                return F.pad(mask.to(tokens.device), (self.prefix_tokens, 0), value=False)
            # A longer mask begins with tokens of a cache or of a learned prefix, which are not among these.
            if shape[1] >= length:
                return mask[:, shape[1] - length :].to(tokens.device)
        expected = f"a padding mask of shape {tuple(tokens.shape[:-1])}, one entry a token"
        raise op_error("InsertedWorkspace", expected, shape)
