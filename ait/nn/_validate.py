"""Checks of hyper-parameters and inputs of the layers: what was expected, and what came."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ait.ops._checks import TOKEN_DTYPES, op_error


def check_number(owner: str, name: str, value: Any, interval: str) -> float:
    """``value`` as a float inside ``interval``, which is written as in mathematics: ``"(0, 1]"``, ``"[0, inf)"``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    expected = f"{name} to be a finite number in {interval}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise op_error(owner, expected, repr(value))
    try:
        number = float(value)
    except OverflowError:
        raise op_error(owner, expected, "a number too large for a float") from None
    if not math.isfinite(number):
        raise op_error(owner, expected, repr(value))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise op_error(owner, expected, repr(value))
    return number


def check_dtype(owner: str, dtype: Any) -> None:
    """Checks that parameters can have ``dtype``; None is the default one."""
    if dtype is not None and dtype not in TOKEN_DTYPES:
        raise op_error(owner, "dtype float32, float64, bfloat16, float16 or None", repr(dtype))


def check_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise op_error(owner, f"{name} to be one of {', '.join(map(repr, choices))}", repr(value))
    return value


def check_input(owner: str, x: Any, dim: int, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Checks that ``x`` is ``(B, *, dim)``, on ``device`` and of one of ``dtypes``."""
    if not isinstance(x, Tensor):
        raise op_error(owner, f"input to be a tensor of shape (B, *, {dim})", type(x).__name__)
    if x.dim() < 2 or x.shape[-1] != dim:
        raise op_error(owner, f"input of shape (B, *, {dim})", tuple(x.shape))
    if x.device != device:
        raise op_error(owner, f"input on the layer's device, {device}", x.device)
    if x.dtype not in dtypes:
        raise op_error(owner, f"input of dtype {' or '.join(map(str, dtypes))}", x.dtype)


def check_padding_mask(owner: str, mask: Any, x: Tensor) -> None:
    """Checks that ``mask`` has one bool for each token of ``x (B, *, E)``."""
    expected = f"key_padding_mask of shape {tuple(x.shape[:-1])}, one entry a token"
    if not isinstance(mask, Tensor):
        raise op_error(owner, expected, type(mask).__name__)
    if mask.dtype != torch.bool:
        raise op_error(owner, "key_padding_mask of dtype torch.bool (True = ignore)", mask.dtype)
    if mask.shape != x.shape[:-1]:
        raise op_error(owner, expected, tuple(mask.shape))
    if mask.device != x.device:
        raise op_error(owner, f"key_padding_mask on the device of the input, {x.device}", mask.device)


def suggest(wrong: str, known: Sequence[str]) -> str:
    """What may have been meant by an unknown name, and all that there are."""
    close = " or ".join(map(repr, difflib.get_close_matches(wrong.lower(), known)))
    return (f"did you mean {close}? " if close else "") + f"There are {', '.join(map(repr, known))}"


def replica_error(owner: str) -> RuntimeError:
    """For a replica that torch.nn.DataParallel made of a module with a memory."""
    return RuntimeError(
        f"{owner}: expected a model that is not in torch.nn.DataParallel, got one of its replicas: each would write a "
        "memory of its own, and lose it; use torch.nn.parallel.DistributedDataParallel"
    )
