"""What the workspaces of a model do to a few validation images, and how its memory moved: for logs and the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ait
from ait.recording import MemoryHistory, scalars

IMAGES = 16
ENERGY_STEPS = 4
RECORDING, MEMORY = "recording.npz", "memory.npz"


class LookInside:
    """Follows the workspaces of a model in training. A model without one is left alone.

    Args:
        model: as it is trained, but not compiled.
        validation: the images to look at: up to 16 of them, evenly spaced.
        prepare: from bytes and questions of a batch to what the model takes.
    """

    def __init__(
        self, model: nn.Module, validation: Any, prepare: Callable[[Tensor, list[Tensor]], list[Tensor]]
    ) -> None:
        self.model = model
        self.prepare = prepare
        self.history: MemoryHistory | None = None
        if any(isinstance(module, ait.GlobalWorkspace) for module in model.modules()):
            self.history = MemoryHistory(model)
            self.history.log(0)
            chosen = torch.linspace(0, len(validation) - 1, min(IMAGES, len(validation))).round().long()
            images, *questions, _ = zip(*(validation[int(index)] for index in chosen), strict=True)
            self.pixels, self.questions = torch.stack(images), [torch.stack(each) for each in questions]

    @torch.no_grad()
    def record(self, epoch: int, out: Path, keep: bool) -> dict[str, float]:
        """Looks at the model at the end of an epoch.

        Args:
            epoch: from 1; the memories of all epochs go to ``memory.npz``.
            out: folder of the run.
            keep: whether to put the recording in the place of ``recording.npz``.

        Returns:
            The numbers of :func:`ait.recording.scalars`.
        """
        if self.history is None:
            return {}
        self.history.log(epoch)
        self.history.save(out / MEMORY)
        # A copy: with released semantics each forward pass moves the memory, in evaluation, too.
        model = copy.deepcopy(self.model).eval()
        with ait.record(model, attention=True, energy_steps=ENERGY_STEPS, device="cpu") as trace:
            model(*self.prepare(self.pixels, self.questions))
        if keep:
            trace[-1].inputs = self.pixels  # bytes, which figures show as they are
            trace.save(out / RECORDING)
        return scalars(trace[-1])

    def state_dict(self) -> dict[str, Any] | None:
        """For :meth:`load_state_dict`, to go on after an interruption."""
        return None if self.history is None else self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes back to where :meth:`state_dict` was called; None, of an older checkpoint, changes nothing."""
        if self.history is not None and state is not None:
            self.history.load_state_dict(state)
