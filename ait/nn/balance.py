"""The balance loss: are all tokens heard alike, or always the same few?"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ait.nn.injection import Injection


def importance_and_load(gates: Tensor, indices: Tensor | None, num_tokens: int, num_heads: int) -> Tensor:
    """Per head and token, the sum of its gates and the number of its gates above 0.

    The sums are exact, hence the same bits in every order (threads, atomics, compilers): float64 holds any sum of
    ``M`` gates once each is rounded to a multiple of ``2^-q``, with ``q = 47`` for 32 slots.

    Args:
        gates: ``(S*M, k)``, heads outermost, each in ``[0, 1]``; 0 where the index is -1.
        indices: ``(S*M, k)``, the tokens that the gates belong to; None where ``k`` is all tokens, in order.
        num_tokens: ``T``.
        num_heads: ``S``.

    Returns:
        ``(2, S, T)``: importance, differentiable in ``gates``, and load, which is not. float64 (float32 on MPS,
        which has nothing wider).
    """
    num_rows = gates.shape[0]
    slots_per_head = num_rows // num_heads
    wide = gates.to(torch.float32 if gates.device.type == "mps" else torch.float64)
    value = wide.detach()
    is_open = (value > 0).to(value.dtype)
    if value.dtype == torch.float64:
        unit = 2.0 ** (52 - (slots_per_head - 1).bit_length())
        # The rounding is part of the value and not of the gradient.
        wide = wide + (torch.round(value * unit) / unit - value)
    if indices is None:
        shape = (num_heads, slots_per_head, num_tokens)
        return torch.stack([wide.view(shape).sum(1), is_open.view(shape).sum(1)])
    where, nothing = indices.clamp(min=0).view(num_heads, -1), wide.new_zeros(num_heads, num_tokens)
    importance = nothing.scatter_add(1, where, wide.view(num_heads, -1))
    load = nothing.scatter_add(1, where, is_open.view(num_heads, -1))
    return torch.stack([importance, load])


def squared_variation(values: Tensor, mask: Tensor | None) -> Tensor:
    """``CV^2(v) = var_unbiased(v) / (mean(v)^2 + 1e-10)`` over the last axis; 0 for fewer than two entries.

    Args:
        values: ``(..., T)``; 0 where masked.
        mask: ``(T,)`` bool, True = ignore, or None.

    Returns:
        ``(...)``.
    """
    if mask is None:
        count = values.shape[-1]
        mean = values.sum(-1, keepdim=True) / max(count, 1)
        squares = (values - mean).square().sum(-1)
        return squares / max(count - 1, 1) / (mean.squeeze(-1).square() + 1e-10)
    count_seen = (~mask).sum().to(values.dtype)
    mean = values.sum(-1, keepdim=True) / count_seen.clamp_min(1)
    squares = (values - mean).masked_fill(mask, 0).square().sum(-1)
    return squares / (count_seen - 1).clamp_min(1) / (mean.squeeze(-1).square() + 1e-10)


class KeptLoss:
    """The balance loss of one layer's last forward pass, until it has been back-propagated.

    It belongs to a forward pass and not to the model: copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.collected: tuple[Tensor, ...] | None = None  # None: nobody collects
        self.injection: Injection | None = None  # where there is one, ``last`` is a number to look at

    def keep(self, loss: Tensor) -> None:
        self.last = loss
        if self.collected is not None:
            # A new tuple, since compilers follow an assignment where they lose a list that grows.
            self.collected = (*self.collected, loss)
        if not torch.compiler.is_compiling():
            self.drop_once_spent()

    def drop_once_spent(self) -> None:
        """Lets go of the loss, and of the graph behind it, as soon as its gradient arrives."""
        loss = self.last
        if loss is None or not loss.requires_grad:
            return
        keeper_ref, loss_ref = weakref.ref(self), weakref.ref(loss)

        def drop(_: Tensor) -> None:
            keeper = keeper_ref()
            if keeper is not None and keeper.last is loss_ref():
                keeper.last = None

        loss.register_hook(drop)

    def __reduce__(self) -> tuple[type[KeptLoss], tuple[()]]:
        return KeptLoss, ()


class CollectedLosses(Sequence[Tensor]):
    """The balance losses that layers have kept since this collection began, layer by layer."""

    def __init__(self, keepers: Sequence[KeptLoss]) -> None:
        self._begun = [(keeper, 0 if keeper.collected is None else len(keeper.collected)) for keeper in keepers]
        self._first = [keeper for keeper in keepers if keeper.collected is None]
        self._closed: list[Tensor] | None = None
        for keeper in self._first:
            keeper.collected = ()

    def close(self) -> None:
        """Ends the collection; what it holds stays."""
        self._closed = self._all()
        for keeper in self._first:
            keeper.collected = None
        self._begun = []

    def _all(self) -> list[Tensor]:
        if self._closed is not None:
            return self._closed
        return [loss for keeper, start in self._begun for loss in (keeper.collected or ())[start:]]

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self._all()[index]
