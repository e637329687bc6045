"""Keeps compiled parts of models from running compiled while something records."""

from __future__ import annotations

from typing import Any

import torch

INSIDE_COMPILED = (
    "record: expected a call outside of functions that torch.compile compiles, got one inside; put "
    "`with ait.record(model)` around the call of the compiled function"
)


class EagerStance:
    """``torch.compiler.set_stance("force_eager")`` for as long as anyone needs it.

    Compiled code ignores module hooks that came after its compilation. PyTorch's stance is one for the process, and
    each change restores the one before it; recordings that end in another order than they began would leave it wrong,
    so only the first sets it and only the last restores it.
    """

    def __init__(self) -> None:
        self._count = 0
        self._stance: Any = None

    def enter(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(INSIDE_COMPILED)
        if self._count == 0:
            try:
                self._stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise RuntimeError(INSIDE_COMPILED) from error
            self._stance.__enter__()
        self._count += 1

    def leave(self) -> None:
        self._count -= 1
        if self._count == 0:
            self._stance.__exit__(None, None, None)
            self._stance = None


EAGER = EagerStance()
