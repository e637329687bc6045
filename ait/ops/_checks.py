"""Argument checks of the operators: what was expected, and what came."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

TOKEN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def op_error(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}")


def check_tensors(name: str, **arguments: Any) -> None:
    """Checks that all arguments are tensors, and that none carries a tangent of forward-mode autograd."""
    for argument, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected {argument} to be a torch.Tensor, got {type(value).__name__}")
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for argument, value in arguments.items():
        # Without this the tangent would be lost in silence.
        if forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{name}: forward-mode autograd is not implemented, and {argument} has a tangent")


def check_tokens(name: str, **pair: Tensor) -> None:
    """Checks dtype and device of ``(what asks, what is asked)``: float32 or the dtype of the latter, same device."""
    (asking_name, asking), (tokens_name, tokens) = pair.items()
    if tokens.dtype not in TOKEN_DTYPES:
        raise op_error(name, f"{tokens_name} of dtype float32, float64, bfloat16 or float16", tokens.dtype)
    if asking.dtype not in (torch.float32, tokens.dtype):
        expected = f"{asking_name} of dtype float32 or that of {tokens_name} ({tokens.dtype})"
        raise op_error(name, expected, asking.dtype)
    if asking.device != tokens.device:
        raise op_error(name, f"{asking_name} on the device of {tokens_name}, {tokens.device}", asking.device)


def check_mask(name: str, mask: Tensor, tokens: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise op_error(name, "mask of dtype torch.bool (True = ignore)", mask.dtype)
    if mask.shape != tokens.shape[:1]:
        raise op_error(name, f"mask of shape ({tokens.shape[0]},), one entry a token", tuple(mask.shape))
    if mask.device != tokens.device:
        raise op_error(name, f"mask on the device of tokens, {tokens.device}", mask.device)


def check_positive_int(name: str, argument: str, value: Any) -> int:
    """``value`` as an int (symbolic ones as they are), be it Python's or NumPy's."""
    if not isinstance(value, (numbers.Integral, torch.SymInt)) or isinstance(value, bool):
        raise op_error(name, f"{argument} to be an integer", f"{value!r}")
    if value < 1:
        raise op_error(name, f"{argument} >= 1", value)
    return int(value) if isinstance(value, numbers.Integral) else cast(int, value)


def is_positive_in(dtype: torch.dtype, value: float) -> bool:
    """Whether ``value`` neither overflows nor vanishes in ``dtype``."""
    return torch.finfo(dtype).tiny <= value <= torch.finfo(dtype).max


def no_double_backward(name: str) -> Callable[..., NoReturn]:
    """The backward of a backward operator: the error that says so."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"ait::{name}: double backward is not implemented")

    return backward
