"""What a training script says to all workspaces of a model at once."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ait.nn.balance import CollectedLosses, KeptLoss
from ait.nn.workspace import GlobalWorkspace


def balance_loss(model: nn.Module) -> Tensor:
    """Sum of the balance losses that the last forward pass left in ``model``, to be added to the training loss.

    ``balance_weight`` (``sigma``) is inside. Layers in ``eval()``, frozen or without a writer count 0. Each layer
    lets go of its loss once that has been back-propagated.

    Args:
        model: any module with workspaces in it, also inside wrappers (``DistributedDataParallel``,
            ``torch.compile``).

    Returns:
        A scalar, on the device of the first workspace.

    Raises:
        ValueError: ``model`` has no workspace.
        RuntimeError: no loss is kept: no forward pass since the last backward pass; or
            :func:`ait.inject_balance_loss` adds it already.
    """
    kept = [workspace._kept_loss for workspace in workspaces_of("balance_loss", model)]
    _refuse_injected("balance_loss", kept)
    losses = [keeper.last for keeper in kept if keeper.last is not None]
    if not losses:
        raise RuntimeError(
            "balance_loss: expected a forward pass of the model before it, and after the last backward pass; "
            "no workspace holds a balance loss"
        )
    if not torch.compiler.is_compiling():
        for keeper in kept:
            keeper.drop_once_spent()
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


@contextlib.contextmanager
def balance_losses(model: nn.Module) -> Iterator[Sequence[Tensor]]:
    """Collects the balance loss of every forward pass inside, for models that run twice before the backward pass.

    ::

        with ait.balance_losses(model) as losses:
            loss = distance(model(view_1), model(view_2))
        (loss + sum(losses)).backward()

    Args:
        model: any module with workspaces in it.

    Yields:
        A sequence that gains one scalar for each forward pass of each workspace, ``balance_weight`` inside; layer by
        layer, and within a layer in the order of the passes. It may be summed inside or after the block.

    Raises:
        ValueError: ``model`` has no workspace.
        RuntimeError: :func:`ait.inject_balance_loss` adds the losses already.
    """
    kept = [workspace._kept_loss for workspace in workspaces_of("balance_losses", model)]
    _refuse_injected("balance_losses", kept)
    losses = CollectedLosses(kept)
    try:
        yield losses
    finally:
        losses.close()


def freeze_memory(model: nn.Module, frozen: bool = True) -> None:
    """Stops every workspace of ``model`` from writing, also in training, and its writer from learning.

    Writers get ``requires_grad=False`` (as does a learned memory); ``frozen=False`` undoes it, parameter by
    parameter. A frozen layer's balance loss is 0.

    Args:
        model: any module with workspaces in it.
        frozen: whether to freeze or to unfreeze.

    Raises:
        ValueError: ``model`` has no workspace, or ``frozen`` is not a bool.
    """
    if not isinstance(frozen, bool):
        raise ValueError(f"freeze_memory: expected frozen to be True or False, got {frozen!r}")
    for workspace in workspaces_of("freeze_memory", model):
        workspace.freeze(frozen)


def reset_memory(model: nn.Module, seed: int | torch.Generator | None = None) -> None:
    """Draws a new memory for every workspace of ``model``, in the order of its modules.

    Args:
        model: any module with workspaces in it.
        seed: an integer or a generator for a reproducible memory, the same on every device for an integer or a CPU
            generator; None draws from PyTorch's global generator.

    Raises:
        ValueError: ``model`` has no workspace, or ``seed`` is none of these.
    """
    workspaces = workspaces_of("reset_memory", model)
    generator: torch.Generator | None
    if seed is None or isinstance(seed, torch.Generator):
        generator = seed
    elif isinstance(seed, numbers.Integral) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"reset_memory: expected seed to be an int of 64 bits, got {int(seed):#x}")
        generator = torch.Generator().manual_seed(int(seed))
    else:
        raise ValueError(f"reset_memory: expected seed to be an int, a torch.Generator or None, got {seed!r}")
    for workspace in workspaces:
        workspace.memory.reset(generator)


def _refuse_injected(caller: str, kept: Sequence[KeptLoss]) -> None:
    if any(keeper.injection is not None for keeper in kept):
        raise RuntimeError(
            f"{caller}: expected a model without injected balance loss, got one to which inject_balance_loss adds it "
            "already, in the backward pass; to look at it use the handle's last_loss(), to add it yourself the "
            "handle's remove()"
        )


def workspaces_of(caller: str, model: Any) -> list[GlobalWorkspace]:
    """All workspaces of ``model``; a ValueError in the name of ``caller`` where there is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(module, GlobalWorkspace)]
    if not found:
        raise ValueError(
            f"{caller}: expected a model with a GlobalWorkspace or GlobalWorkspaceLayer in it, "
            f"got {type(model).__name__} without one"
        )
    return found
