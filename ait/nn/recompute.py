"""Activation checkpointing: a recompute reads the memory that its own forward pass read, and writes nothing.

A checkpointed forward pass runs twice, the second time inside a backward pass. By then the memory has moved on, so
the layer keeps a short list of what its last forward passes read (a few thousand numbers each), and a recompute looks
up its own. Which one that is follows from the contents of the tokens, and among equal contents from autograd's
sequence numbers, which tell when the graph that is being walked was recorded. Contents are compared on the device:
nothing waits for it.

Compiled regions are left to the compiler: there is nothing of this in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RECORDS_KEPT = 64


@dataclass(eq=False)
class ForwardRecord:
    """What one forward pass read, and in which mode it ran."""

    stored: Tensor  # the slots (M, D), as stored before this pass
    writes: bool
    training: bool
    shape: tuple[Any, ...]  # what must agree for a recompute of this pass
    fingerprint: Tensor | None  # of the tokens, (E,); only where the pass wrote
    sequence_number: int  # of the next node that autograd would record
    grad_enabled: bool  # False in the first pass of reentrant checkpointing
    balance_grad: Callable[[], Tensor | None]  # gradient that reached this pass's balance loss


class BalanceGradient:
    """Holds the gradient of a balance loss between the backward pass that computes it and the recompute's own."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def receive(self, grad: Tensor) -> None:
        self.value = grad

    def __call__(self) -> Tensor | None:
        return self.value


class _PassBalanceGradient(torch.autograd.Function):
    """Returns its input; in the backward pass, the balance loss gets the gradient that came for its forward pass.

    Reentrant checkpointing runs its first pass without autograd, so the balance loss kept from there is a leaf that
    the graph of the recompute does not contain. Its gradient is known by the time of the recompute: the nodes after
    the model run before the nodes of the model.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, balance_grad: Callable[[], Tensor | None]) -> Tensor:
        ctx.balance_grad = balance_grad
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        return grad_output, ctx.balance_grad(), None


def pass_balance_gradient(output: Tensor, loss: Tensor, record: ForwardRecord) -> Tensor:
    """``output``, made to carry the gradient of ``loss`` where a reentrant recompute would lose it."""
    if record.grad_enabled or not (torch.is_grad_enabled() and loss.requires_grad):
        return output
    return _PassBalanceGradient.apply(output, loss, record.balance_grad)


class ForwardRecords:
    """The last forward passes of one layer. They belong to a run and not to the model: copies and pickles are empty."""

    def __init__(self) -> None:
        self.records: deque[ForwardRecord] = deque(maxlen=RECORDS_KEPT)

    def add(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        stored: Tensor,
        *,
        writes: bool,
        training: bool,
        balance_grad: Callable[[], Tensor | None],
    ) -> None:
        self.records.append(
            ForwardRecord(
                stored=stored,
                writes=writes,
                training=training,
                shape=_shape(tokens, mask),
                fingerprint=_fingerprint(tokens) if writes else None,
                sequence_number=torch.autograd._get_sequence_nr(),
                grad_enabled=torch.is_grad_enabled(),
                balance_grad=balance_grad,
            )
        )

    def find(self, tokens: Tensor, mask: Tensor | None) -> ForwardRecord | None:
        """The record of the forward pass that this one repeats; None where this one is no recompute."""
        if torch._C._current_graph_task_id() == -1:
            return None
        shape = _shape(tokens, mask)
        candidates = [record for record in self.records if record.shape == shape]
        if not candidates:
            return None
        candidates.sort(key=_distance_from(torch._C._current_autograd_node()._sequence_nr()))
        best = candidates[0]
        if not best.writes:
            return best
        return _choose([record for record in candidates if record.writes], _fingerprint(tokens))

    def __reduce__(self) -> tuple[type[ForwardRecords], tuple[()]]:
        return ForwardRecords, ()


def _shape(tokens: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    return tokens.shape, tokens.dtype, tokens.device, mask is None


def _fingerprint(tokens: Tensor) -> Tensor:
    """Sum of the tokens ``(T, E) -> (E,)``; no norm or mean of a token, which a LayerNorm would make all alike."""
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return tokens.detach().sum(0, dtype=dtype)


def _distance_from(current: int) -> Callable[[ForwardRecord], tuple[bool, int]]:
    """Sort key: how far a record lies from the node of the graph that autograd is at, impossible ones last.

    Checkpointing without reentrance recomputes when a tensor saved in the region is unpacked, so that node was
    recorded after the layer began, in the grad mode of now; and it packs what the recompute saves, with hooks. The
    node of reentrant checkpointing was made before its region ran, without autograd.
    """
    by_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    grad_enabled = torch.is_grad_enabled() if by_hooks else False

    def key(record: ForwardRecord) -> tuple[bool, int]:
        began_before = record.sequence_number <= current
        possible = began_before == by_hooks and record.grad_enabled == grad_enabled
        return not possible, abs(record.sequence_number - current)

    return key


def _choose(candidates: list[ForwardRecord], fingerprint: Tensor) -> ForwardRecord:
    """The first candidate with this fingerprint, or the first of all where none has it (or it holds a NaN)."""
    best = candidates[0]
    if len(candidates) == 1:
        return best
    known = torch.stack([record.fingerprint for record in candidates if record.fingerprint is not None])
    matches = (known == fingerprint).all(-1)
    rank = torch.arange(len(candidates), 0, -1, device=fingerprint.device)
    chosen = torch.argmax(matches * rank).view(1)

    def balance_grad() -> Tensor | None:
        grads = [record.balance_grad() for record in candidates]
        present = next((grad for grad in grads if grad is not None), None)
        if present is None:
            return None
        filled = torch.stack([torch.zeros_like(present) if grad is None else grad for grad in grads])
        return filled.index_select(0, chosen).squeeze(0)

    return ForwardRecord(
        stored=torch.stack([record.stored for record in candidates]).index_select(0, chosen).squeeze(0),
        writes=best.writes,
        training=best.training,
        shape=best.shape,
        fingerprint=fingerprint,
        sequence_number=best.sequence_number,
        grad_enabled=best.grad_enabled,
        balance_grad=balance_grad,
    )
