"""The memory over training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ait.nn.memory import row_norms
from ait.ops._checks import check_positive_int, op_error
from ait.recording.files import read_tensors, write_tensors
from ait.recording.layout import choose_workspaces, find_name, find_workspaces, unwrap

FORMAT = "ait-memory-history-1"


class MemoryHistory:
    """Copies of a model's memories at chosen steps of its training, on the CPU.

    ::

        history = ait.MemoryHistory(model, every=100)
        for step, batch in enumerate(loader):
            history.log(step)  # copies at steps 0, 100, 200, ...
            ...
        history.save("memory.npz")

    Args:
        model: any module with workspaces in it.
        every: keep a copy at steps that are multiples of this.
        layers: as in :func:`ait.record`.

    Raises:
        ValueError: ``model`` has no workspace, a layer does not exist, or ``every`` is no positive integer.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 1, layers: Sequence[str | int] | str | int | None = None
    ) -> None:
        name = "MemoryHistory"
        workspaces = find_workspaces(name, unwrap(model) if isinstance(model, nn.Module) else model)
        self._workspaces = choose_workspaces(name, workspaces, layers)
        self.every = check_positive_int(name, "every", every)
        self.steps: list[int] = []
        self._memories: dict[str, list[Tensor]] = {layer: [] for layer in self._workspaces}

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers, as in a trace."""
        return list(self._memories)

    @torch.no_grad()
    def log(self, step: int) -> bool:
        """Keeps a copy of every memory if ``step`` is a multiple of ``every``.

        Args:
            step: at least 0, and larger than those kept before.

        Returns:
            Whether copies were kept.

        Raises:
            ValueError: ``step`` is not as above, or this history was loaded from a file and has no model.
        """
        if not self._workspaces:
            raise op_error("MemoryHistory.log", "a history made of a model", "one that was loaded from a file")
        first = self.steps[-1] + 1 if self.steps else 0
        if not hasattr(step, "__index__") or step < 0:
            raise op_error("MemoryHistory.log", "a step that is an integer of at least 0", repr(step))
        if step % self.every:
            return False
        if step < first:
            raise op_error("MemoryHistory.log", f"a step after {self.steps[-1]}", step)
        self.steps.append(int(step))
        for name, workspace in self._workspaces.items():
            memory = workspace.memory
            self._memories[name].append(memory.as_read(memory.gamma).detach().to("cpu", copy=True))
        return True

    def memory(self, layer: str | int = 0) -> Tensor:
        """``(steps, M, D)``: the slots as the layer reads them.

        Raises:
            ValueError: there is no such layer, or nothing was kept.
        """
        name = find_name("MemoryHistory", self.layer_names, layer)
        if not self.steps:
            raise op_error("MemoryHistory", "at least one step kept by log(step)", "an empty history")
        return torch.stack(self._memories[name])

    def distance(self, layer: str | int = 0) -> Tensor:
        """``(steps, M)``: L2 distance of each slot from where it stood at the first step."""
        memory = self.memory(layer)
        return torch.linalg.vector_norm(memory - memory[0], dim=-1)

    def similarity(self, layer: str | int = 0) -> Tensor:
        """``(steps, M)``: cosine between each slot and itself at the first step."""
        memory = self.memory(layer)
        unit = memory / row_norms(memory)
        return (unit * unit[0]).sum(-1)

    def gram(self, layer: str | int = 0) -> Tensor:
        """``(steps, M, M)``: cosines between all slots of a step."""
        memory = self.memory(layer)
        unit = memory / row_norms(memory)
        return unit @ unit.mT

    def state_dict(self) -> dict[str, Any]:
        """What was kept, for a checkpoint from which training goes on."""
        return {"steps": list(self.steps), "memories": {name: list(kept) for name, kept in self._memories.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the place of what was kept; :meth:`log` goes on behind it.

        Raises:
            ValueError: it is of other layers, or of memories of another shape.
        """
        shapes = {name: tuple(w.memory.gamma.shape) for name, w in self._workspaces.items()}
        theirs = {name: kept[0].shape if kept else shapes.get(name) for name, kept in state["memories"].items()}
        if {name: tuple(shape or ()) for name, shape in theirs.items()} != shapes:
            raise op_error("MemoryHistory.load_state_dict", f"memories of the model, {shapes}", theirs)
        self.steps = list(state["steps"])
        self._memories = {name: list(state["memories"][name]) for name in shapes}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the history to ``*.npz`` or, with safetensors installed, ``*.safetensors``.

        Raises:
            ValueError: another suffix, or nothing was kept.
            ImportError: safetensors is needed and not installed.
            OSError: the file cannot be written; one that was there is left as it was.
        """
        tensors = {str(index): self.memory(name) for index, name in enumerate(self.layer_names)}
        meta = {"format": FORMAT, "every": self.every, "steps": self.steps, "layers": self.layer_names}
        write_tensors("MemoryHistory.save", Path(path), tensors, json.dumps(meta))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> MemoryHistory:
        """Reads a history that :meth:`save` wrote; it can be drawn, and not continued.

        Raises:
            ValueError: another suffix, or the file holds no history.
            ImportError: safetensors is needed and not installed.
            OSError: the file cannot be read.
        """
        tensors, meta = read_tensors("MemoryHistory.load", Path(path))
        history = object.__new__(MemoryHistory)
        try:
            content = json.loads(meta)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            history._workspaces, history.every, history.steps = {}, content["every"], content["steps"]
            history._memories = {name: list(tensors[str(i)]) for i, name in enumerate(content["layers"])}
        except (KeyError, TypeError, ValueError) as error:
            raise op_error("MemoryHistory.load", f"a history ({FORMAT})", f"{path}: {error!r}") from error
        return history
