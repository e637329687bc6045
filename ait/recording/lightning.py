"""The quantities of a recording through Lightning's ``self.log``. Needs lightning, or pytorch_lightning."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

if importlib.util.find_spec("lightning") is not None:
    from lightning.pytorch.callbacks import Callback
elif importlib.util.find_spec("pytorch_lightning") is not None:
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]
else:
    raise ImportError("WorkspaceCallback: cannot import lightning or pytorch_lightning; pip install lightning")

from ait.ops._checks import check_positive_int
from ait.recording.loggers import SampledRecorder
from ait.recording.scalars import scalars


class WorkspaceCallback(Callback):
    """Logs the quantities of :func:`ait.recording.scalars` every ``every`` training steps.

    ::

        trainer = lightning.Trainer(callbacks=[WorkspaceCallback(every=50)])

    The forward pass of a training step is recorded only if that step is logged; with several forward passes in a step,
    or gradient accumulation, the last one before the optimiser's step. In training on several processes each rank
    records its own share of the batch, and what is logged is rank 0's. Lightning writes to its loggers every
    ``log_every_n_steps`` steps (an argument of the Trainer), and repeats the last values between two samples.

    Args:
        every: log at global steps that are multiples of this.
        layers: as in :func:`ait.record`.
        tag: what names begin with: ``"<tag>/<layer>/<quantity>"``.

    Raises:
        ValueError: ``every`` is no positive integer; when training starts: the model has no workspace, or a layer does
            not exist.
    """

    def __init__(
        self, *, every: int = 50, layers: Sequence[str | int] | str | int | None = None, tag: str = "workspace"
    ) -> None:
        super().__init__()
        self.every = check_positive_int("WorkspaceCallback", "every", every)
        self.layers = layers
        self.tag = tag
        self._sampled: SampledRecorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._sampled = SampledRecorder(pl_module, self.every, self.layers)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._sampled is not None and self._sampled.is_due(trainer.global_step):
            self._sampled.begin()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._sampled is None:
            return
        recorded = self._sampled.end()
        if recorded is not None:
            values = {f"{self.tag}/{name}": value for name, value in scalars(recorded).items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._sampled is not None:
            self._sampled.end()
            self._sampled = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
