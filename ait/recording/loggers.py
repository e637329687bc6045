"""Writes what workspaces do to TensorBoard, every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from ait.ops._checks import check_positive_int, op_error
from ait.recording.recorder import Recorder
from ait.recording.scalars import scalars
from ait.recording.trace import Pass


class ScalarWriter(Protocol):
    """What is asked of a writer: :class:`torch.utils.tensorboard.SummaryWriter` has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...

    def add_histogram(self, tag: str, values: Any, global_step: int) -> Any: ...


class SampledRecorder:
    """Records the forward passes before every so-manieth step, and no others."""

    def __init__(self, model: nn.Module, every: int, layers: Sequence[str | int] | str | int | None) -> None:
        self.every = check_positive_int("WorkspaceLogger", "every", every)
        self._recorder = Recorder(model, layers=layers, write="as_run", max_passes=1)
        self._recording = False

    def begin(self) -> None:
        if not self._recording:
            self._recorder.trace.passes.clear()
            self._recorder.start()
            self._recording = True

    def end(self) -> Pass | None:
        """The last pass since :meth:`begin`; None without one."""
        if not self._recording:
            return None
        self._recorder.stop()
        self._recording = False
        passes = self._recorder.trace.passes
        return passes[-1] if passes else None

    def is_due(self, step: int) -> bool:
        return step % self.every == 0


class WorkspaceLogger:
    """Logs the quantities of :func:`ait.recording.scalars` every ``every`` steps.

    ::

        with ait.WorkspaceLogger(SummaryWriter(), model, every=50) as logger:
            for step, (images, labels) in enumerate(loader):
                loss = criterion(model(images), labels) + ait.balance_loss(model)
                ...
                logger.log(step)

    A forward pass is recorded only if the call of :meth:`log` that follows it is due, so that steps between cost
    nothing; of several forward passes before it, the last is logged. Steps are expected
    to come evenly, from 0 by ones or from their distance on (1, 2, 3 or 10, 20, 30).

    Args:
        writer: such as :class:`torch.utils.tensorboard.SummaryWriter`.
        model: any module with workspaces in it.
        every: log at steps that are multiples of this.
        layers: as in :func:`ait.record`.
        tag: what names begin with: ``"<tag>/<layer>/<quantity>"``.
        histograms: also log the use of slots and the distance that each moved, as histograms.

    Raises:
        ValueError: ``model`` has no workspace, a layer does not exist, or ``every`` is no positive integer.
    """

    def __init__(
        self,
        writer: ScalarWriter,
        model: nn.Module,
        *,
        every: int = 50,
        layers: Sequence[str | int] | str | int | None = None,
        tag: str = "workspace",
        histograms: bool = False,
    ) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            expected = "a writer with add_scalar, such as torch.utils.tensorboard.SummaryWriter"
            raise op_error("WorkspaceLogger", expected, type(writer).__name__)
        self.writer = writer
        self.tag = tag
        self.histograms = histograms
        self._sampled = SampledRecorder(model, every, layers)
        self._last_step: int | None = None
        self._sampled.begin()

    def log(self, step: int) -> dict[str, float]:
        """Logs the last forward pass if ``step`` is due, and prepares for the next one that is.

        Args:
            step: of the training, an integer.

        Returns:
            What was logged; empty where the step was not due or no forward pass came before it.
        """
        step = int(step)
        logged: dict[str, float] = {}
        if self._sampled.is_due(step):
            recorded = self._sampled.end()
            if recorded is not None:
                logged = scalars(recorded)
                self._write(recorded, logged, step)
        # Before the second step nobody knows how far apart they are: as far as the first is from 0 (10, 20, 30), or 1.
        stride = max(step - (self._last_step or 0), 1)
        self._last_step = step
        if self._sampled.is_due(step + stride):
            self._sampled.begin()
        else:
            self._sampled.end()
        return logged

    def close(self) -> None:
        """Takes the logger's hooks out of the model. The writer stays open."""
        self._sampled.end()

    def __enter__(self) -> WorkspaceLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, recorded: Pass, logged: dict[str, float], step: int) -> None:
        for name, value in logged.items():
            self.writer.add_scalar(f"{self.tag}/{name}", value, step)
        if self.histograms:
            for layer in recorded:
                if layer.heard.any():
                    self.writer.add_histogram(f"{self.tag}/{layer.name}/slot_use", layer.slot_use, step)
                self.writer.add_histogram(f"{self.tag}/{layer.name}/moved", layer.moved, step)
