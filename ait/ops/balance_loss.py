"""The balance loss: are all tokens heard alike, or always the same few?"""

from __future__ import annotations

import torch
from torch import Tensor

from ait.ops import reference
from ait.ops._checks import check_tensors, no_double_backward
from ait.ops._library import register_reference


def balance_of(
    gates: Tensor, indices: Tensor | None, mask: Tensor | None, num_tokens: int, num_heads: int, weight: float
) -> Tensor:
    """The squared variations ``CV^2`` of all heads' importance and load over the tokens, summed, times ``weight``.

    Args:
        gates: ``(S*M, k)``, heads outermost, each in ``[0, 1]``, float32 or float64; 0 where the index is -1.
        indices: ``(S*M, k)``, the tokens that the gates belong to, -1 for none; None where ``k`` is all tokens, in
            order.
        mask: ``(T,)`` bool, True = ignore: such tokens have no gate above 0. Or None.
        num_tokens: ``T``.
        num_heads: ``S``.
        weight: factor of the loss.

    Returns:
        A scalar in the dtype of ``gates``, differentiable in them (once, on CPU and with ``indices``). The sums of
        gates in it are exact, so that their order does not matter.
    """
    if indices is None or gates.device.type != "cpu":
        sums = reference.importance_and_load(gates, indices, num_tokens, num_heads)
        variation, _, _ = reference.squared_variation(sums, mask)
        return (variation.sum() * weight).to(gates.dtype)
    check_tensors("balance_loss", gates=gates)
    loss: Tensor = torch.ops.ait.balance_loss(gates, indices, mask, num_tokens, num_heads, weight)[0]
    return loss


register_reference("balance_loss", reference.balance_loss)
register_reference("balance_loss_backward", reference.balance_loss_backward)


@torch.library.register_fake("ait::balance_loss")
def _(gates, indices, mask, num_tokens, num_heads, weight):
    return gates.new_empty(()), gates.new_empty(num_heads, num_tokens)


@torch.library.register_fake("ait::balance_loss_backward")
def _(grad_loss, gates, indices, slope):
    return gates.new_empty(gates.shape)


def _setup_context(ctx, inputs, output):
    gates, indices, _, _, _, _ = inputs
    _, slope = output
    ctx.mark_non_differentiable(slope)
    ctx.save_for_backward(gates, indices, slope)


def _backward(ctx, grad_loss, grad_slope):
    return torch.ops.ait.balance_loss_backward(grad_loss, *ctx.saved_tensors), None, None, None, None, None


torch.library.register_autograd("ait::balance_loss", _backward, setup_context=_setup_context)
torch.library.register_autograd("ait::balance_loss_backward", no_double_backward("balance_loss"))
