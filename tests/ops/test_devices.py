"""Tensors on different devices: every operator says which one is where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ait

# Operator: a call, its tensors, and the one whose device the others have to share.
CALLS: dict[str, tuple[Callable[..., object], dict[str, torch.Tensor], str]] = {
    "bottleneck_select": (
        lambda **tensors: ait.ops.bottleneck_select(k=2, **tensors),
        {"query": torch.zeros(1, 3, 8), "tokens": torch.zeros(5, 8), "mask": torch.zeros(5, dtype=torch.bool)},
        "tokens",
    ),
    "bottleneck_attend": (
        ait.ops.bottleneck_attend,
        {"query": torch.zeros(3, 8), "tokens": torch.zeros(5, 8), "indices": torch.arange(2).repeat(3, 1)},
        "tokens",
    ),
    "hopfield_retrieve": (
        ait.ops.hopfield_retrieve,
        {"state": torch.zeros(5, 8), "patterns": torch.zeros(3, 8)},
        "state",
    ),
}


@pytest.mark.parametrize(
    ("operator", "argument"), [(op, name) for op, (_, tensors, _) in CALLS.items() for name in tensors]
)
def test_a_tensor_on_another_device_is_an_error_that_names_both(operator: str, argument: str) -> None:
    call, tensors, shared = CALLS[operator]
    moved = {**tensors, argument: tensors[argument].to("meta")}
    device = moved[shared].device
    with pytest.raises(ValueError, match=f"{operator}: expected .* on the device of {shared}, {device}, got "):
        call(**moved)
