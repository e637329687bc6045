"""The balance loss for trainers that see only logits."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

from ait.nn.balance import KeptLoss
from ait.nn.control import workspaces_of
from ait.nn.injection import NAME, Injection, without_scale
from ait.ops._checks import op_error


class BalanceInjection:
    """Handle of :func:`inject_balance_loss`; as a context manager it removes the injection at the end of the block."""

    def __init__(self, kept: list[KeptLoss], injection: Injection) -> None:
        self._kept = kept
        self._injection = injection
        for keeper in kept:
            keeper.last = None
            keeper.injection = injection

    @property
    def active(self) -> bool:
        """Whether forward passes are still given the balance loss."""
        return any(keeper.injection is self._injection for keeper in self._kept)

    def last_loss(self) -> Tensor:
        """Sum of the balance losses of the last forward pass, for a log: a scalar without gradient, unscaled.

        Raises:
            RuntimeError: no forward pass has run, or the injection was removed.
        """
        losses = [k.last for k in self._kept if k.injection is self._injection and k.last is not None]
        if not losses:
            raise RuntimeError(f"{NAME}: expected a forward pass of the model before last_loss(), got none")
        total = losses[0].detach()
        for loss in losses[1:]:
            total = total + loss.detach().to(total.device)
        return total

    def remove(self) -> None:
        """Ends the injection for all forward passes from now on; a second time nothing happens."""
        for keeper in self._kept:
            if keeper.injection is self._injection:
                keeper.injection, keeper.last = None, None

    def __enter__(self) -> BalanceInjection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def inject_balance_loss(model: nn.Module, scale: Callable[[], float | Tensor] | None = None) -> BalanceInjection:
    """Adds the balance loss in the backward pass, for trainers that see only the model's output.

    From now on, a backward pass of any loss gives the gradients of ``loss + scale() * ait.balance_loss(model)``: with
    timm's ``train.py``, transformers' ``Trainer`` or Lightning nothing else has to change. Outputs stay as they are,
    bit for bit. The loss that the trainer logs is without the balance loss, which :meth:`BalanceInjection.last_loss`
    returns.

    Each layer's loss enters where a backward pass crosses that layer, once for each forward pass: also where the model
    runs several times before the backward pass, under activation checkpointing of both kinds, ``torch.compile`` and
    ``DistributedDataParallel`` (gradients are averaged over processes, those of the balance loss included). Further
    backward passes through the same forward pass (``retain_graph=True``, which compiled ones refuse) add nothing. In
    ``eval()``, under ``no_grad`` and with frozen memory nothing is added.

    ``scale`` tells what the trainer multiplies its loss by before the backward pass, which the backward pass cannot
    see: the gradient scaler's factor, and one over the number of accumulated batches. With neither, leave it out::

        ait.inject_balance_loss(model, scale=lambda: scaler.get_scale() / accumulation_steps)

    | trainer | ``scale`` |
    |---|---|
    | timm ``train.py --grad-accum-steps N`` | ``lambda: 1 / N`` |
    | ... with ``--amp --amp-dtype float16`` | ``lambda: loss_scaler._scaler.get_scale() / N`` |
    | transformers ``Trainer`` | ``lambda: 1 / trainer.current_gradient_accumulation_steps`` |
    | ... with ``fp16=True`` | ``lambda: trainer.accelerator.scaler.get_scale() / ...`` (the same) |
    | Lightning ``accumulate_grad_batches=N`` | ``lambda: 1 / N`` |
    | ... with ``precision="16-mixed"`` | ``lambda: trainer.precision_plugin.scaler.get_scale() / N`` |

    It is asked once in each backward pass. Insert workspaces before, not after. Copies and pickles of the model
    (averaged weights, checkpoints, spawned processes) come without the injection, and the state dict does not know it.

    Args:
        model: any module with workspaces in it, also inside wrappers.
        scale: called without arguments; returns a finite number of at least 0, or a tensor of shape ``()`` with one
            (checked only where it is on the CPU). None stands for 1.

    Returns:
        A handle whose ``remove()`` ends it; it is a context manager as well.

    Raises:
        ValueError: ``model`` has no workspace, ``scale`` is no callable, or (in the backward pass) what it returns is
            not as above.
        RuntimeError: the balance loss is injected already, or being collected by :func:`ait.balance_losses`; the model
            is in float16, or (in the forward pass) its tokens or autocast are, and there is no ``scale``.

    :func:`ait.balance_loss` and :func:`ait.balance_losses` refuse a model with an injection, since the loss would count
    twice; a layer's own ``return_aux=True`` then returns a loss without gradient.
    """
    kept = [workspace._kept_loss for workspace in workspaces_of(NAME, model)]
    if scale is not None and not callable(scale):
        raise op_error(NAME, "scale to be callable or None (for a number, lambda: number)", repr(scale))
    if any(keeper.injection is not None for keeper in kept):
        raise RuntimeError(
            f"{NAME}: expected a model without injected balance loss, got one that has it; call the first handle's "
            "remove() before"
        )
    if any(keeper.collected is not None for keeper in kept):
        raise RuntimeError(
            f"{NAME}: expected a model whose balance losses nobody adds, got a call inside ait.balance_losses"
        )
    if scale is None and any(p.dtype == torch.float16 for p in model.parameters()):
        raise without_scale("parameters in float16")
    return BalanceInjection(kept, Injection(scale))
