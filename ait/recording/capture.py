"""What one workspace does in one forward pass, as its parts are called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ait.nn.readers import AttentionReader, HopfieldReader
from ait.nn.workspace import GlobalWorkspace
from ait.nn.writer import Write
from ait.ops import hopfield_energy, hopfield_retrieve
from ait.ops.reference import accumulate_dtype, importance_and_load
from ait.recording.layout import find_ambient_mask, patch_grid
from ait.recording.statistics import energy_path, retrieval_weights
from ait.recording.trace import LayerRecord, WriteRecord


@dataclass(frozen=True)
class Options:
    """What :func:`ait.record` was asked for."""

    always_write: bool
    energy_steps: int | None
    keep_tokens: bool
    device: torch.device | None
    detach: bool

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy that nothing will change."""
        tensor = tensor.detach() if self.detach else tensor
        return tensor.clone() if self.device is None else tensor.to(self.device, copy=True)


def in_backward() -> bool:
    """Whether a backward pass is running; a forward pass inside it is a recomputation."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def observing(detach: bool, device_type: str | None = None) -> Iterator[None]:
    """For computations that the model's run must not notice.

    Modes around the model would count what is computed here, or, in selective checkpointing, mistake it for results
    of the model; autocast, that of ``device_type``, would round it; and tensors made in inference mode could not be
    used outside it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        has_autocast = device_type is not None and torch.amp.is_autocast_available(device_type)
        if device_type is not None and has_autocast and torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if detach:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


class Capture:
    """Collects the calls of one workspace's writer and reader, and makes a record of each forward pass."""

    def __init__(self, name: str, workspace: GlobalWorkspace, model: nn.Module, options: Options) -> None:
        self.name = name
        self.workspace = workspace
        self.model = model
        self.options = options
        self.ambient_mask = find_ambient_mask(model, workspace)
        self._shape: tuple[int, ...] | None = None
        self._mask: Tensor | None = None
        self._write: tuple[Tensor, Write] | None = None  # memory before, and what was to be written
        self._read: tuple[Tensor, Tensor, Tensor] | None = None  # tokens, memory, retrieved tokens

    def begin(self, f: Any = None, key_padding_mask: Any = None, *args: Any, **kwargs: Any) -> None:
        """A forward pass begins; its arguments have not been checked yet."""
        self._shape = tuple(f.shape[:-1]) if isinstance(f, Tensor) else None
        if key_padding_mask is None and self.ambient_mask is not None and isinstance(f, Tensor):
            # A workspace that does not write is not told, and the write that is computed here must be.
            key_padding_mask = self.ambient_mask(f)
        self._mask = key_padding_mask
        self._write = self._read = None

    def wrote(self, args: tuple[Any, ...], write: Write) -> None:
        self._write = args[0], write

    def read(self, args: tuple[Any, ...], retrieved: Tensor) -> None:
        self._read = args[0], args[1], retrieved

    def end(self) -> LayerRecord | None:
        """The record; None where the forward pass did not come to its end."""
        if self._read is None or self._shape is None:
            return None
        with observing(self.options.detach, self._read[0].device.type):
            record = self._record(*self._read, self._shape)
        self._write = self._read = self._mask = None
        return record

    def _record(self, tokens: Tensor, memory_after: Tensor, retrieved: Tensor, shape: tuple[int, ...]) -> LayerRecord:
        keep, workspace = self.options.keep, self.workspace
        if self.options.detach:
            tokens, memory_after, retrieved = tokens.detach(), memory_after.detach(), retrieved.detach()
        mask = None if self._mask is None else self._mask.reshape(-1)
        loss = workspace._kept_loss.last
        return LayerRecord(
            name=self.name,
            shape=shape,
            **self._grid(shape),
            training=workspace.training,
            k=min(workspace.capacity(tokens.shape[0]), tokens.shape[0]),
            alpha=workspace.alpha,
            mask=None if mask is None else keep(mask),
            memory_before=keep(memory_after if self._write is None else self._write[0]),
            memory_after=keep(memory_after),
            balance_loss=None if loss is None else keep(loss),
            tokens=keep(tokens) if self.options.keep_tokens else None,
            retrieved=keep(retrieved) if self.options.keep_tokens else None,
            write=self._write_record(tokens, mask, memory_after),
            **self._read_fields(tokens, memory_after, retrieved),
        )

    def _grid(self, shape: tuple[int, ...]) -> dict[str, Any]:
        if len(shape) == 3:
            return {"grid": (shape[1], shape[2]), "prefix_tokens": 0}
        grid, prefix_tokens = patch_grid(self.model, shape[1]) if len(shape) == 2 else (None, None)
        return {"grid": grid, "prefix_tokens": prefix_tokens}

    def _read_fields(self, tokens: Tensor, memory: Tensor, retrieved: Tensor) -> dict[str, Any]:
        reader, keep, options = self.workspace.reader, self.options.keep, self.options
        fields: dict[str, Any] = dict.fromkeys(("beta", "patterns", "energy_before", "energy_after", "energy_path"))
        if isinstance(reader, AttentionReader):
            return fields | {"retrieval": keep(_attention_weights(reader, tokens, memory))}
        beta, patterns = reader.beta, reader.patterns(memory)
        state = tokens.to(accumulate_dtype(tokens.dtype))
        weights = retrieval_weights(state, patterns, beta, _steps_taken(reader, tokens, patterns))
        path = None
        if options.energy_steps is not None:
            path = keep(energy_path(state, patterns, beta, options.energy_steps))
        return {
            "beta": beta,
            "patterns": keep(patterns),
            "retrieval": keep(weights),
            "energy_before": keep(hopfield_energy(state, patterns, beta)),
            "energy_after": keep(hopfield_energy(retrieved, patterns, beta)),
            "energy_path": path,
        }

    def _write_record(self, tokens: Tensor, mask: Tensor | None, memory_after: Tensor) -> WriteRecord | None:
        workspace, keep = self.workspace, self.options.keep
        if workspace.writer is None or not tokens.shape[0] or not (self._write or self.options.always_write):
            return None
        if self._write is not None:
            before, write = self._write
        else:
            before = memory_after
            k = workspace.capacity(tokens.shape[0])
            # Not as a module: its hooks would take this for the layer's own write.
            write = workspace.writer.forward(before, tokens, mask, k, training=False)
        written, finite = workspace.memory.normalize(torch.lerp(before, write.candidate, workspace.alpha))
        accepted = finite if mask is None else finite & ~mask.all()
        num_heads, num_slots = workspace.writer.num_heads, before.shape[0]
        sums = importance_and_load(write.gates, write.indices, tokens.shape[0], num_heads)
        importance, load = sums.to(write.gates.dtype)
        shape = (num_heads, num_slots, -1)
        return WriteRecord(
            gates=keep(write.gates.view(shape)),
            indices=None if write.indices is None else keep(write.indices.view(shape)),
            importance=keep(importance),
            load=keep(load),
            memory=keep(torch.where(accepted, written, before)),
            kept=self._write is not None and bool(accepted),
        )


def _steps_taken(reader: HopfieldReader, tokens: Tensor, patterns: Tensor) -> Tensor:
    if reader.steps > 1 and reader.tol > 0:
        return hopfield_retrieve(tokens, patterns, reader.beta, reader.steps, reader.tol)[1]
    return torch.full(tokens.shape[:1], reader.steps, dtype=torch.int64, device=tokens.device)


def _attention_weights(reader: AttentionReader, tokens: Tensor, memory: Tensor) -> Tensor:
    dtype = accumulate_dtype(tokens.dtype)
    query = nn.functional.linear(tokens.to(dtype), reader.query.weight.to(dtype))
    key = nn.functional.linear(memory.to(dtype), reader.key.weight.to(dtype))
    query_STD, key_SMD = (x.unflatten(-1, (reader.num_heads, -1)).transpose(0, 1) for x in (query, key))
    return torch.softmax(query_STD @ key_SMD.mT * query_STD.shape[-1] ** -0.5, dim=-1).mean(0)
