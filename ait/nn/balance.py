"""The balance loss: are all tokens heard alike, or always the same few?"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, overload

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
    return _sums(gates, None if indices is None else indices.clamp(min=0), num_tokens, num_heads)


def _sums(gates: Tensor, indices: Tensor | None, num_tokens: int, num_heads: int) -> Tensor:
    slots_per_head = gates.shape[0] // num_heads
    wide = gates.to(torch.float32 if gates.device.type == "mps" else torch.float64)
    is_open = (gates > 0).to(wide.dtype)
    if wide.dtype == torch.float64:
        # What lies between this number and twice as much are the multiples of 2^-q.
        power = 2.0 ** (slots_per_head - 1).bit_length()
        wide = (wide + power) - power
    if indices is None:
        shape = (num_heads, slots_per_head, num_tokens)
        return torch.stack([wide.view(shape).sum(1), is_open.view(shape).sum(1)])
    sums, indices = wide.new_zeros(2, num_heads, num_tokens), indices.view(num_heads, -1)
    sums[0].scatter_add_(1, indices, wide.view(num_heads, -1))
    sums[1].scatter_add_(1, indices, is_open.view(num_heads, -1))
    return sums


def squared_variation(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``CV^2(v) = var_unbiased(v) / (mean(v)^2 + 1e-10)`` over the last axis; 0 for fewer than two entries.

    Args:
        values: ``(..., T)``; 0 where masked.
        mask: ``(T,)`` bool, True = ignore, or None.

    Returns:
        Three tensors ``(..., 1)``: ``CV^2``, and ``scale`` and ``center`` of its derivative by an entry,
        ``2 (v - center) / scale``.
    """
    count: float | Tensor
    freedom: float | Tensor
    if mask is None:
        count, freedom = float(max(values.shape[-1], 1)), float(max(values.shape[-1] - 1, 1))
    else:
        count_seen = (~mask).sum().to(values.dtype)
        count, freedom = count_seen.clamp_min(1), (count_seen - 1).clamp_min(1)
    mean = values.sum(-1, keepdim=True) / count
    deviation = values - mean
    if mask is not None:
        deviation = deviation.masked_fill(mask, 0)
    scale = (mean * mean + 1e-10) * freedom
    variation = (deviation * deviation).sum(-1, keepdim=True) / scale
    return variation, scale, mean + mean * variation * (freedom / count)


class _BalanceLoss(torch.autograd.Function):
    """The loss with its derivative: one gathering, where autograd would go back through some twenty small steps."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        num_tokens: int,
        num_heads: int,
        weight: float,
    ) -> Tensor:
        if mask is not None:
            indices = indices.clamp(min=0)
        sums = _sums(gates, indices, num_tokens, num_heads)
        variation, scale, center = squared_variation(sums, mask)
        ctx.save_for_backward(indices, sums[0], scale[0], center[0])
        ctx.dtype, ctx.weight = gates.dtype, weight
        return _loss(variation, weight, gates)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        indices, importance_ST, scale_S1, center_S1 = ctx.saved_tensors
        slope_ST = (importance_ST - center_S1) * (grad * (2 * ctx.weight) / scale_S1)
        slope = slope_ST.to(ctx.dtype).gather(1, indices.view(slope_ST.shape[0], -1))
        return slope.view(indices.shape), None, None, None, None, None


def _loss(variation: Tensor, weight: float, gates: Tensor) -> Tensor:
    return (variation.sum() * weight).to(gates.dtype)


def balance_of(
    gates: Tensor, indices: Tensor | None, mask: Tensor | None, num_tokens: int, num_heads: int, weight: float
) -> Tensor:
    """The balance loss: ``weight`` times the squared variations of all heads' importance and load, over the tokens.

    Args:
        gates: as in :func:`importance_and_load`.
        indices: as there; without a mask none is -1.
        mask: ``(T,)`` bool, True = ignore: such tokens have no gate above 0. Or None.
        num_tokens: ``T``.
        num_heads: ``S``.
        weight: factor of the loss.

    Returns:
        A scalar in the dtype of ``gates``, differentiable in them (once, where there are ``indices``).
    """
    if indices is None or torch.compiler.is_compiling():  # compilers join the small steps themselves
        sums = importance_and_load(gates, indices, num_tokens, num_heads)
        return _loss(squared_variation(sums, mask)[0], weight, gates)
    loss: Tensor = _BalanceLoss.apply(gates, indices, mask, num_tokens, num_heads, weight)
    return loss


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
