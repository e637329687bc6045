"""The balance loss of layers: how it is kept until it is asked for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ait.nn.injection import Injection


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
