"""What a recording holds: passes of a model, and in each what every workspace did.

Shape suffixes: ``B`` images, ``N`` tokens an image, ``T = B*N``, ``E`` token width, ``M`` slots, ``D`` slot width,
``S`` heads, ``k`` tokens a row.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ait.ops._checks import op_error
from ait.recording.layout import find_name
from ait.recording.statistics import dense_gates, perplexity


class _Record:
    """Shows the shapes of its tensors, and not their entries."""

    def __repr__(self) -> str:
        shown = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in shown.items())})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if value.dim() else f"{float(value):g}"
    return f"[{', '.join(value)}]" if isinstance(value, dict) else repr(value)


@dataclass(eq=False, repr=False)
class WriteRecord(_Record):
    """A batch's write into the memory, kept or only computed."""

    gates: Tensor
    """``(S, M, k)``, float32 or float64: how much each (head, slot) row takes of its tokens; a row sums to 1."""
    indices: Tensor | None
    """``(S, M, k)`` int64, ascending, -1 last: the tokens of the batch, ``0 .. T-1``, that a row takes. None where a
    row takes all tokens, in order."""
    importance: Tensor
    """``(S, T)``: a head's gates, summed over slots."""
    load: Tensor
    """``(S, T)``: how many slots of a head take a token with a gate above 0."""
    memory: Tensor
    """``(M, D)``: the memory that this write leads to."""
    kept: bool
    """Whether the layer holds that memory now. False where the write was only computed (eval, a frozen memory), and
    for a batch that would have made the memory non-finite or held padding alone."""

    def dense_gates(self) -> Tensor:
        """Gates by token, ``(S, M, T)``, 0 for tokens that a row does not take."""
        return dense_gates(self.gates, self.indices, self.importance.shape[-1])

    @property
    def row_perplexity(self) -> Tensor:
        """``(S, M)``: how many tokens a row takes in effect, from 1 to ``k``."""
        return perplexity(self.gates)

    @property
    def head_perplexity(self) -> Tensor:
        """``(S,)``: how many tokens a head hears in effect, all slots together, from 1 to ``T``."""
        return perplexity(self.importance)


@dataclass(eq=False, repr=False)
class LayerRecord(_Record):
    """One forward pass of one workspace."""

    name: str
    """Name of the :class:`~ait.GlobalWorkspace` in the model; a second call within a pass ends in ``#1``."""
    shape: tuple[int, ...]
    """``(B, *)``, the input's shape without ``E``."""
    grid: tuple[int, int] | None
    """Rows and columns of patches in an image, where the model tells them."""
    prefix_tokens: int | None
    """Tokens of an image before its patches (class token, registers, a question), where the model tells them."""
    training: bool
    """Whether the layer was in training."""
    k: int
    """Tokens that a (head, slot) row takes at most."""
    alpha: float
    """Weight of a batch in the moving average."""
    beta: float | None
    """Inverse temperature of the Hopfield retrieval; None with an attention reader."""
    mask: Tensor | None
    """``(T,)`` bool, True = ignored by the write; None without padding."""
    memory_before: Tensor
    """``(M, D)``: the slots that the write started from."""
    memory_after: Tensor
    """``(M, D)``: the slots that the tokens were read from."""
    patterns: Tensor | None
    """``(M, E)``: what the slots look like to the tokens; None with an attention reader."""
    retrieval: Tensor
    """``(T, M)``: weights of the slots in each retrieved token (last retrieval step; mean over heads with an attention
    reader); rows sum to 1."""
    energy_before: Tensor | None
    """``(T,)``: Hopfield energy of the tokens that came; None with an attention reader."""
    energy_after: Tensor | None
    """``(T,)``: Hopfield energy of the retrieved tokens."""
    energy_path: Tensor | None
    """``(n + 1, T)``: energy before and after each of ``energy_steps`` retrieval steps; None if not asked for."""
    balance_loss: Tensor | None
    """Scalar with its weight inside; None where the layer kept none."""
    tokens: Tensor | None
    """``(T, E)``: the tokens that came; None if not asked for."""
    retrieved: Tensor | None
    """``(T, E)``: the tokens that were retrieved; None if not asked for."""
    write: WriteRecord | None
    """None for a memory without a writer, or where no write was computed."""

    @property
    def batch(self) -> int:
        """``B``."""
        return self.shape[0]

    @property
    def tokens_per_image(self) -> int:
        """``N``."""
        return self.retrieval.shape[0] // max(self.batch, 1)

    @property
    def num_slots(self) -> int:
        """``M``."""
        return self.retrieval.shape[1]

    @property
    def pattern(self) -> Tensor:
        """``(T,)`` int64: the slot that each token fell to, the largest of its retrieval weights."""
        return self.retrieval.argmax(-1)

    @property
    def heard(self) -> Tensor:
        """``(T,)`` bool: the tokens that are no padding."""
        everything = torch.ones(self.retrieval.shape[:1], dtype=torch.bool, device=self.retrieval.device)
        return everything if self.mask is None else ~self.mask

    @property
    def slot_use(self) -> Tensor:
        """``(M,)``: mean retrieval weight of each slot over the tokens that are no padding; sums to 1, or is 0 where
        there are none."""
        weights = self.retrieval[self.heard]
        return weights.sum(0) / max(weights.shape[0], 1)

    @property
    def slot_perplexity(self) -> Tensor:
        """Scalar: how many slots the tokens are rebuilt from in effect, from 1 to ``M``; 0 where all are padding."""
        return perplexity(self.slot_use)

    @property
    def moved(self) -> Tensor:
        """``(M,)``: L2 distance of each slot between before and after."""
        return torch.linalg.vector_norm(self.memory_after - self.memory_before, dim=-1)

    def dead_slots(self, threshold: float = 0.01) -> Tensor:
        """Slots that hardly any token is rebuilt from: ``slot_use < threshold / M``, int64."""
        return torch.nonzero(self.slot_use < threshold / self.num_slots).flatten()

    def by_image(self, values: Tensor) -> Tensor:
        """``(..., T)`` as ``(..., B, N)``."""
        if values.shape[-1] != self.retrieval.shape[0]:
            expected = f"values of shape (..., {self.retrieval.shape[0]}), one for each token"
            raise op_error("LayerRecord.by_image", expected, tuple(values.shape))
        return values.unflatten(-1, (self.batch, self.tokens_per_image))

    def require_write(self, caller: str) -> WriteRecord:
        """The write, or an error that says why there is none.

        Raises:
            ValueError: there is none.
        """
        if self.write is None:
            raise op_error(
                caller,
                f"a write of layer {self.name!r}",
                "none: its memory has no writer (memory='learned' or 'fixed'), the batch was empty, or the recording "
                "was made with write='as_run' of a layer that did not write (record with write='always')",
            )
        return self.write


@dataclass(eq=False, repr=False)
class AttentionRecord(_Record):
    """One self-attention of a pass, in its place among the layers."""

    weights: Tensor
    """``(B, N, N)``, mean over heads: from each token (second axis) to the tokens that it reads (last axis)."""
    before: int
    """How many layer records of the pass came before it."""


@dataclass(eq=False, repr=False)
class Pass(_Record):
    """One forward pass of the model."""

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    """By name, in the order of their calls."""
    attention: list[AttentionRecord] = field(default_factory=list)
    """In the order of their calls; empty without ``attention=True``."""
    inputs: Tensor | None = None
    """The model's first tensor argument; None if not asked for."""
    complete: bool = True
    """False where the forward pass raised an exception."""

    def __getitem__(self, layer: str | int) -> LayerRecord:
        return self.layers[find_name("record", list(self.layers), layer)]

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self.layers.values())

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(eq=False, repr=False)
class Trace:
    """A recording: the forward passes of a model, oldest first."""

    model: str
    """Class of the model."""
    passes: list[Pass] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __getitem__(self, index: int) -> Pass:
        if not self.passes:
            raise op_error("record", "a forward pass of the model inside the recording", "none: the trace is empty")
        if not isinstance(index, int) or not -len(self.passes) <= index < len(self.passes):
            raise op_error("record", f"the index of one of {len(self.passes)} recorded passes", repr(index))
        return self.passes[index]

    def layer(self, layer: str | int, index: int = -1) -> LayerRecord:
        """Record of one layer in one pass, by default the last.

        Args:
            layer: index, name, or name of a module around it (``"blocks.0"``).
            index: which pass.

        Raises:
            ValueError: the trace is empty, or holds no such layer or pass.
        """
        return self[index][layer]

    @property
    def layer_names(self) -> list[str]:
        """Names of the recorded layers, in the order of their first calls."""
        return list(dict.fromkeys(name for each in self.passes for name in each.layers))

    def summary(self, index: int = -1) -> str:
        """A table of one pass, by default the last: for each layer what :func:`ait.recording.scalars` gives.

        Raises:
            ValueError: there is no such pass.
        """
        from ait.recording.scalars import table

        return table(self[index])

    def __repr__(self) -> str:
        names = self.layer_names
        layers = f"{len(names)} layers, {names[0]!r} to {names[-1]!r}" if names else "no layers"
        passes = "1 pass" if len(self) == 1 else f"{len(self)} passes"
        return f"Trace({self.model}, {passes}, {layers})"

    def to(self, device: torch.device | str) -> Trace:
        """The same trace with all tensors on ``device``."""
        return map_tensors(self, lambda tensor: tensor.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace to ``*.npz`` or, with safetensors installed, ``*.safetensors``.

        Raises:
            ValueError: another suffix.
            ImportError: safetensors is needed and not installed.
            OSError: the file cannot be written; one that was there is left as it was.
        """
        from ait.recording.files import save_trace

        save_trace(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Trace:
        """Reads a trace that :meth:`save` wrote; its tensors are on the CPU.

        Raises:
            ValueError: another suffix, or the file holds no trace.
            ImportError: safetensors is needed and not installed.
            OSError: the file cannot be read.
        """
        from ait.recording.files import load_trace

        return load_trace(path)


def check_trace(caller: str, trace: Any) -> Trace:
    """The trace, or an error that says what came in its place.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(trace, Trace):
        raise op_error(caller, "a Trace, such as `with ait.record(model) as trace:` gives", type(trace).__name__)
    return trace


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of records, lists and dictionaries in which every tensor went through ``function``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [map_tensors(each, function) for each in value]
    if isinstance(value, dict):
        return {key: map_tensors(each, function) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(
            value, **{each.name: map_tensors(getattr(value, each.name), function) for each in fields}
        )
    return value
