"""Activation checkpointing: a recompute reads the memory that its own forward pass read, and writes nothing.

A checkpointed forward pass runs twice, the second time inside a backward pass. By then the memory has moved on, so
the layer keeps a short list of what its last forward passes read that may be recomputed (a few thousand numbers each),
and a recompute looks up its own. Which one that is follows from the contents of the tokens, and among equal contents
from autograd's sequence numbers, which tell when the graph that is being walked was recorded. Contents are compared on
the device: nothing waits for it.

A recompute whose forward pass is no longer kept raises, and one whose tokens are those of no kept pass gets NaN: a
gradient through another pass's memory would look right and be wrong.

Compiled regions are left to the compiler: there is nothing of this in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ait.nn.injection import Injection

RECORDS_KEPT = 64
SAMPLED_TOKENS = 256
# Differences of fingerprints, relative to the largest entry. Below the first they are the rounding of the sums; up to
# the second, that of kernels which repeat a result in another order (half precision included), never other contents.
EQUAL, SIMILAR = 1e-5, 1e-2


class BalanceGradient:
    """Holds the gradient of a balance loss between the backward pass that computes it and the recompute's own."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def receive(self, grad: Tensor) -> None:
        self.value = grad

    def __call__(self) -> Tensor | None:
        return self.value


class ForwardPass(NamedTuple):
    """What a forward pass reads, and in which mode it runs."""

    stored: Tensor  # the slots (M, D), as stored before this pass
    writes: bool
    training: bool
    grad_enabled: bool  # False in the first pass of reentrant checkpointing
    balance_grad: BalanceGradient  # that reached this pass's balance loss
    mask: Tensor | None = None  # (T,), where a recompute is not given it again
    injection: Injection | None = None  # that supplies this gradient instead
    is_recompute: bool = False


@dataclass(eq=False)
class ForwardRecord:
    """One forward pass, with all by which a recompute of it is known."""

    forward_pass: ForwardPass
    shape: tuple[Any, ...]
    fingerprint: Tensor  # of the tokens, (E,)
    sequence_number: int  # of the next node that autograd would record


class _PassBalanceGradient(torch.autograd.Function):
    """Returns its input; in the backward pass, the balance loss gets the gradient that came for its forward pass.

    Reentrant checkpointing runs its first pass without autograd, so the balance loss kept from there is a leaf that
    the graph of the recompute does not contain. Its gradient is known by the time of the recompute: the nodes after
    the model run before the nodes of the model.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, balance_grad: BalanceGradient) -> Tensor:
        ctx.balance_grad = balance_grad
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        return grad_output, ctx.balance_grad(), None


def pass_balance_gradient(output: Tensor, loss: Tensor, repeated: ForwardPass) -> Tensor:
    """``output``, made to carry the gradient of ``loss`` where a reentrant recompute would lose it."""
    if repeated.grad_enabled or not (torch.is_grad_enabled() and loss.requires_grad):
        return output
    return _PassBalanceGradient.apply(output, loss, repeated.balance_grad)


class ForwardRecords:
    """The last forward passes of one layer. They belong to a run and not to the model: copies and pickles are empty."""

    def __init__(self) -> None:
        self.records: deque[ForwardRecord] = deque(maxlen=RECORDS_KEPT)
        # Apart from the passes, which a recompute must not push out. A recompute within a recompute (nested
        # checkpointing) finds its own outer one by its sequence number.
        self.recomputes: deque[ForwardRecord] = deque(maxlen=RECORDS_KEPT)
        self.last_dropped: int | None = None  # sequence number

    def add(self, tokens: Tensor, mask: Tensor | None, forward_pass: ForwardPass) -> None:
        """Records a pass that is no recompute, if it may be recomputed.

        Both kinds of checkpointing show in the pass itself. One has hooks on saved tensors. The other runs inside a
        function of autograd, without autograd; if the region turns that on again, forward mode stays off.
        """
        if torch._C._current_graph_task_id() == -1:
            self.recomputes.clear()
        without_autograd = not (torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled())
        if not (without_autograd or _recomputes_by_hooks()):
            return
        if len(self.records) == RECORDS_KEPT:
            self.last_dropped = self.records[0].sequence_number
        self.records.append(_record(forward_pass, _shape(tokens, mask), _fingerprint(tokens)))

    def find(self, tokens: Tensor, mask: Tensor | None) -> ForwardPass | None:
        """The forward pass that this one repeats; None where this one is no recompute.

        Raises:
            RuntimeError: it repeats a forward pass that is no longer kept.
        """
        if torch._C._current_graph_task_id() == -1:
            return None
        current = torch._C._current_autograd_node()._sequence_nr()
        records = sorted((*self.records, *self.recomputes), key=_distance_from(current))
        if self._is_dropped(records, current):
            raise RuntimeError(
                f"GlobalWorkspace: expected at most {RECORDS_KEPT} forward passes of a layer between a checkpointed "
                "forward pass and its backward pass, got more; what that pass read is no longer known"
            )
        shape = _shape(tokens, mask)
        candidates = [record for record in records if record.shape == shape]
        if not candidates:
            return None
        fingerprint = _fingerprint(tokens)
        found = _choose(candidates, fingerprint)
        self.recomputes.append(_record(found._replace(grad_enabled=torch.is_grad_enabled()), shape, fingerprint))
        return found

    def _is_dropped(self, records: list[ForwardRecord], current: int) -> bool:
        """Whether the pass that is repeated was pushed out; passes leave in the order in which they came."""
        if self.last_dropped is None:
            return False
        if _recomputes_by_hooks():
            return not any(_is_possible(record, current) for record in records)
        return self.last_dropped > current

    def __reduce__(self) -> tuple[type[ForwardRecords], tuple[()]]:
        return ForwardRecords, ()


def _record(forward_pass: ForwardPass, shape: tuple[Any, ...], fingerprint: Tensor) -> ForwardRecord:
    return ForwardRecord(forward_pass, shape, fingerprint, torch.autograd._get_sequence_nr())


def _shape(tokens: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """What must agree between a forward pass and its recompute."""
    return tokens.shape, tokens.dtype, tokens.device, mask is None


def _fingerprint(tokens: Tensor) -> Tensor:
    """Weighted sum of a sample of the tokens, ``(T, E) -> (E,)``; a sample, since every training pass pays for it.

    The weights tell positions apart and sum to about 0, so that what all tokens share does not drown the rest. There
    is no norm or mean of a token in it, which a LayerNorm would make all alike.
    """
    num_tokens = tokens.shape[0]
    # Odd, so that images of 2^n tokens are not sampled at the same few positions.
    stride = -(-num_tokens // SAMPLED_TOKENS) | 1
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    # A NaN would be unlike itself; the rest of such a batch may well be used.
    sample = torch.nan_to_num(tokens.detach()[::stride].to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
    weights = torch.arange(sample.shape[0], dtype=dtype, device=tokens.device).cos_()
    return weights @ sample


def _recomputes_by_hooks() -> bool:
    """Whether this is checkpointing without reentrance: it packs what a pass and its recompute save, with hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _is_possible(record: ForwardRecord, current: int) -> bool:
    """Whether a recompute at node ``current`` of the graph can be one of ``record``.

    Checkpointing without reentrance recomputes when a tensor saved in the region is unpacked, so that node was
    recorded after the layer began, in the grad mode of now. The node of reentrant checkpointing was made before its
    region ran, without autograd.
    """
    by_hooks = _recomputes_by_hooks()
    grad_enabled = torch.is_grad_enabled() if by_hooks else False
    began_before = record.sequence_number <= current
    return began_before == by_hooks and record.forward_pass.grad_enabled == grad_enabled


def _distance_from(current: int) -> Callable[[ForwardRecord], tuple[bool, int]]:
    """Sort key: how far a record lies from node ``current`` of the graph, impossible ones last."""
    return lambda record: (not _is_possible(record, current), abs(record.sequence_number - current))


def _choose(candidates: list[ForwardRecord], fingerprint: Tensor) -> ForwardPass:
    """The pass with the tokens of this one, the first of them if there are several; its slots are NaN if none is."""
    best = candidates[0].forward_pass
    mode = best.writes, best.training
    candidates = [c for c in candidates if (c.forward_pass.writes, c.forward_pass.training) == mode]
    passes = [candidate.forward_pass for candidate in candidates]
    known = torch.stack([candidate.fingerprint for candidate in candidates])
    distance = (known - fingerprint).abs().amax(-1)
    scale = fingerprint.abs().amax()
    distance = distance.masked_fill(distance <= EQUAL * scale, 0)
    chosen = torch.argmin(distance).view(1)
    stored = torch.stack([p.stored for p in passes]).index_select(0, chosen).squeeze(0)
    similar = distance.index_select(0, chosen) <= SIMILAR * scale
    mask = _choose_mask([p.mask for p in passes], chosen)

    # By the time of a recompute the gradients of the balance losses have come; asking later would go through all
    # recomputes before this one, over and over.
    grads = [p.balance_grad() for p in passes]
    present = next((grad for grad in grads if grad is not None), None)
    balance_grad = BalanceGradient()
    if present is not None:
        filled = torch.stack([torch.zeros_like(present) if grad is None else grad for grad in grads])
        balance_grad.receive(filled.index_select(0, chosen).squeeze(0))
    return best._replace(
        stored=torch.where(similar, stored, torch.nan),
        balance_grad=balance_grad,
        mask=mask,
        is_recompute=True,
    )


def _choose_mask(masks: list[Tensor | None], chosen: Tensor) -> Tensor | None:
    """The mask at ``chosen (1,)``; no mask and one of nothing but False are the same."""
    present = next((mask for mask in masks if mask is not None), None)
    if present is None:
        return None
    filled = torch.stack([torch.zeros_like(present) if mask is None else mask for mask in masks])
    return filled.index_select(0, chosen).squeeze(0)
