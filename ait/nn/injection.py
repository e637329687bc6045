"""The balance loss without a loss: its gradient enters where a backward pass crosses the memory."""

from __future__ import annotations

import itertools
import math
import numbers
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ait.ops._checks import op_error

Scale = Callable[[], "float | Tensor"]
NAME = "inject_balance_loss"

# An operator's arguments are tensors and plain values, so that a compiled backward pass must look its injection up, by
# a number that no other one ever had. As a tensor it is an input of the compiled graph, which so serves them all.
_ALIVE: weakref.WeakValueDictionary[int, Injection] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Injection:
    """One call of :func:`ait.inject_balance_loss`: the gradient that balance losses receive.

    Args:
        scale: as there.
    """

    def __init__(self, scale: Scale | None) -> None:
        self.scale = scale
        number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.number = torch.tensor(number, device="cpu")
        self._of_backward: tuple[int, float | Tensor] | None = None  # id of a backward pass, scale in it
        _ALIVE[number] = self

    def gradient(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What a balance loss receives, a scalar; ``scale`` is asked once in each backward pass.

        Raises:
            ValueError: ``scale`` returns something else than a finite number of at least 0.
        """
        value = self._ask()
        if isinstance(value, Tensor):
            return value.detach().to(device=device, dtype=dtype)
        return torch.full((), value, dtype=dtype, device=device)

    def check_precision(self, tokens: Tensor) -> None:
        """Refuses float16 without a scale, in which small gradients vanish and no trainer leaves the loss as it is."""
        if self.scale is not None:
            return
        device_type = tokens.device.type
        autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        if tokens.dtype == torch.float16 or (autocast and torch.get_autocast_dtype(device_type) == torch.float16):
            raise without_scale("autocast to float16" if autocast else "tokens in float16")

    def _ask(self) -> float | Tensor:
        if self.scale is None:
            return 1.0
        backward = torch._C._current_graph_task_id()
        if self._of_backward is not None and self._of_backward[0] == backward != -1:
            return self._of_backward[1]
        value = _checked(self.scale())
        self._of_backward = backward, value
        return value


def without_scale(got: str) -> RuntimeError:
    return RuntimeError(
        f"{NAME}: expected scale=... where training runs in float16, got None with {got}; pass what the trainer "
        "multiplies the loss by, such as scale=scaler.get_scale (over the accumulation steps)"
    )


def inject_gradient(memory: Tensor, loss: Tensor, injection: Injection) -> Tensor:
    """``memory``, made so that the first backward pass that crosses it gives ``loss`` its gradient.

    Args:
        memory: ``(M, D)``, what all tokens of the pass read.
        loss: the balance loss of the pass, a scalar.
        injection: what supplies the gradient.

    Returns:
        ``(M, D)``, the same values.
    """
    if not (torch.is_grad_enabled() and loss.requires_grad):
        return memory
    if torch.compiler.is_compiling():
        injected: Tensor = _CompiledInjection.apply(memory, loss, injection.number, loss.dtype)
    else:
        injected = _Injection.apply(memory, loss, injection)
    return injected


class _Injection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, memory: Tensor, loss: Tensor, injection: Injection) -> Tensor:
        ctx.injection, ctx.loss_is, ctx.is_spent = injection, (loss.dtype, loss.device), False
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        if ctx.is_spent:
            return grad, None, None
        gradient = ctx.injection.gradient(*ctx.loss_is)
        ctx.is_spent = True
        return grad, gradient, None


class _CompiledInjection(torch.autograd.Function):
    """The same for compilers, which would turn what ``scale`` returns into a constant."""

    @staticmethod
    def forward(ctx: Any, memory: Tensor, loss: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(number)
        ctx.dtype = dtype
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        (number,) = ctx.saved_tensors
        return grad, injected_gradient(grad, number, ctx.dtype), None, None


# What it returns depends on what the host says at that moment, so no CUDA graph may hold it.
@torch.library.custom_op("ait::injected_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def injected_gradient(like: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    injection = _ALIVE.get(int(number))
    if injection is None:
        raise RuntimeError(
            f"{NAME}: expected the handle to live until the backward pass of a compiled forward pass, got a backward "
            "pass after it was removed and dropped"
        )
    return injection.gradient(dtype, like.device)


@injected_gradient.register_fake
def _(like: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((), dtype=dtype)


def _checked(value: Any) -> float | Tensor:
    expected = "scale to return a finite number of at least 0, or a tensor of shape () with one"
    number = value
    if isinstance(value, Tensor):
        if value.shape != () or not value.is_floating_point():
            raise op_error(NAME, expected, f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}")
        if value.device.type != "cpu":
            return value  # looking at it would stop the host until the device has caught up
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise op_error(NAME, expected, repr(value))
    number = float(number)
    if not math.isfinite(number) or number < 0:
        raise op_error(NAME, expected, repr(value))
    return value if isinstance(value, Tensor) else number
