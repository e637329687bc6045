"""The memory: slots that live across batches, in float32 or better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ait.ops import memory_snapshot

MEMORIES = ("ewma", "learned", "fixed")
SMALLEST_NORM = 1e-12


def row_norms(memory: Tensor) -> Tensor:
    """L2 norm of each row, ``(M, D) -> (M, 1)``, never 0."""
    return torch.linalg.vector_norm(memory, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)


class Memory(nn.Module):
    """``gamma (M, D)``, the slots, and how they are kept.

    ``gamma`` is a buffer (a parameter where it is learned by gradient) of at least float32: conversion of the
    module to half precision leaves it in float32, ``.double()`` makes it float64. It starts as Gaussian rows,
    of unit norm with ``unit_rows``.

    Args:
        num_slots: ``M``.
        slot_dim: ``D``.
        kind: ``"ewma"`` (written by every batch), ``"learned"`` (a parameter) or ``"fixed"`` (never changed).
        unit_rows: whether rows have unit norm; they are then normalised when read, too, so that an averaged or
            edited state dict cannot break the invariant.
        generator: source of the initial rows; the global one by default.
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        kind: str,
        *,
        unit_rows: bool,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.unit_rows = unit_rows
        dtype = torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32
        gamma = torch.empty(num_slots, slot_dim, device=device, dtype=dtype)
        self.gamma: Tensor
        if kind == "learned":
            self.gamma = nn.Parameter(gamma)
        else:
            self.register_buffer("gamma", gamma)
        self.skipped_updates: Tensor
        self.register_buffer("skipped_updates", torch.zeros((), dtype=torch.int64, device=device))
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws new rows, in place, the same on every device for one state of ``generator``."""
        if self.gamma.is_meta:
            return
        device = generator.device if generator is not None else "cpu"
        rows = torch.randn(self.gamma.shape, generator=generator, device=device, dtype=self.gamma.dtype)
        if self.unit_rows:
            rows = rows / row_norms(rows)
        self.gamma.copy_(rows)
        self.skipped_updates.zero_()

    def snapshot(self) -> Tensor:
        """The slots as stored, ``(M, D)``: the parameter itself, or a copy that later updates do not touch."""
        if self.kind != "ewma":
            return self.gamma
        return memory_snapshot(self.gamma) if torch.compiler.is_compiling() else self.gamma.clone()

    def as_read(self, stored: Tensor) -> Tensor:
        """The slots as the layer uses them: unit rows, unless ``unit_rows`` is off."""
        return stored / row_norms(stored) if self.unit_rows else stored

    def normalize(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """``mixed (M, D)`` with unit rows, and whether all rows had a finite norm: a bool on the device."""
        norms = row_norms(mixed)
        return mixed / norms, (norms < math.inf).all()

    @torch.no_grad()
    def store(self, new: Tensor, accepted: Tensor, finite: Tensor) -> None:
        """Overwrites the slots with ``new`` where ``accepted``, and counts an update that was not ``finite``."""
        self.gamma.copy_(torch.where(accepted, new.detach(), self.gamma))
        self.skipped_updates.add_(finite.logical_not())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Memory:
        def at_least_float32(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor.is_floating_point() and converted.dtype.itemsize < 4:
                return tensor.to(device=converted.device, dtype=torch.float32)
            return converted

        return super()._apply(at_least_float32, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the tensor of the state dict itself would take the place of gamma.
        name = f"{prefix}gamma"
        gamma = state_dict.get(name)
        if isinstance(gamma, Tensor) and gamma.is_floating_point() and gamma.dtype.itemsize < 4:
            state_dict = {**state_dict, name: gamma.float()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        slots, width = self.gamma.shape
        return f"{slots} slots of width {width}, {self.kind!r}, {'unit' if self.unit_rows else 'free'} rows"
