"""What reaches TensorBoard and Lightning's loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ait
from ait.recording import scalars
from tests.recording.models import hook_count, small_model, some_images

QUANTITIES = {"slot_perplexity", "dead_slots", "moved", "energy_before", "energy_after", "balance_loss"} | {
    "row_perplexity",
    "coverage",
}


def test_scalars_are_those_of_the_records_without_padding() -> None:
    torch.manual_seed(1)
    layer = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2, top_k=2)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3:] = True
    f = torch.randn(2, 5, 8)
    with ait.record(layer) as trace:
        layer(f, mask)
    seen = trace.layer(0)
    values = scalars(seen)
    assert set(values) == QUANTITIES
    assert seen.energy_before is not None and seen.write is not None and seen.balance_loss is not None
    assert values["energy_before"] == pytest.approx(float(seen.energy_before.view(2, 5)[:, :3].mean()), rel=1e-5)
    taken = {int(index) for index in seen.write.indices.flatten()} if seen.write.indices is not None else set()
    assert values["coverage"] == pytest.approx(len(taken) / 6)
    assert values["balance_loss"] == float(ait.balance_loss(layer).detach()) > 0
    assert values["moved"] == pytest.approx(float(seen.moved.mean()))
    assert set(scalars(trace[0])) == {f"workspace/{name}" for name in QUANTITIES}


def test_quantities_that_a_layer_does_not_have_are_left_out() -> None:
    layer = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2, memory="fixed", reader="attention")
    with ait.record(layer) as trace:
        layer(torch.randn(2, 5, 8))
    assert set(scalars(trace.layer(0))) == {"slot_perplexity", "dead_slots", "moved", "balance_loss"}


class Kept:
    def __init__(self) -> None:
        self.tags: list[str] = []
        self.values: list[float] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.tags.append(tag)
        self.values.append(scalar_value)

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None:
        self.tags.append(tag)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(2, 5), (0, 5)], ids=["padding", "nothing"])
def test_a_batch_of_padding_alone_logs_what_there_is_to_say_and_no_nan(shape: tuple[int, int], training: bool) -> None:
    torch.manual_seed(1)
    layer = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2).train(training)
    writer = Kept()
    with ait.WorkspaceLogger(writer, layer, every=1, histograms=True) as logger, ait.record(layer) as trace:
        layer(torch.randn(*shape, 8), torch.ones(shape, dtype=torch.bool))
        logged = logger.log(0)
    assert set(logged) == {"workspace/moved", "workspace/balance_loss"}
    assert writer.values == list(logged.values()) == [0.0, 0.0]
    assert set(writer.tags) == {f"workspace/workspace/{name}" for name in ("moved", "balance_loss")}
    seen = trace.layer(0)
    assert float(seen.slot_perplexity) == 0 and not seen.heard.any()
    assert trace.summary().split() == ["layer", "moved", "balance", "loss", "workspace", "0", "0"]


def test_tensorboard_gets_what_a_recording_of_the_same_step_holds_at_every_so_manieth_step(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    model = small_model().train()
    expected: dict[int, dict[str, float]] = {}
    recorded_steps = []
    with (
        SummaryWriter(str(tmp_path)) as writer,
        ait.WorkspaceLogger(writer, model, every=3, tag="gw", histograms=True) as logger,
    ):
        for step in range(8):
            recorded_steps += [step] if hook_count(model) else []
            with ait.record(model) as trace:
                model(some_images(step))
            ait.balance_loss(model).backward()
            logged = logger.log(step)
            assert bool(logged) == (step % 3 == 0)
            if logged:
                expected[step] = logged
                assert logged == scalars(trace[0])
    assert recorded_steps == [0, 3, 6]
    assert hook_count(model) == 0

    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    names = {f"{layer}/{name}" for layer in trace.layer_names for name in QUANTITIES}
    assert set(tags["scalars"]) == {f"gw/{name}" for name in names}
    assert set(tags["histograms"]) == {f"gw/{n}/{q}" for n in trace.layer_names for q in ("slot_use", "moved")}
    for name in names:
        seen = {event.step: event.value for event in events.Scalars(f"gw/{name}")}
        assert seen == {step: pytest.approx(values[name], rel=1e-6) for step, values in expected.items()}, name


def test_a_logger_adapts_to_steps_that_come_in_tens_and_skips_a_step_without_forward_pass() -> None:
    model = small_model().train()
    with ait.WorkspaceLogger(Nothing(), model, every=20) as logger:
        assert logger.log(0) == {}
        seen = {}
        for step in range(10, 70, 10):
            model(some_images(step))
            seen[step] = bool(logger.log(step))
    assert seen == {10: False, 20: True, 30: False, 40: True, 50: False, 60: True}


def test_a_logger_whose_every_is_the_distance_of_steps_loses_none_of_them() -> None:
    model = small_model().train()
    logged = []
    with ait.WorkspaceLogger(Nothing(), model, every=10) as logger:
        for step in range(10, 50, 10):
            model(some_images(step))
            logged += [step] if logger.log(step) else []
    assert logged == [10, 20, 30, 40]


class Nothing:
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None: ...


def test_lightning_logs_the_quantities_of_sampled_steps(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from ait.recording.lightning import WorkspaceCallback

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model()
            self.hooks: list[int] = []
            self.moved: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.hooks.append(hook_count(self.model))
            with ait.record(self.model) as trace:
                loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.moved.append(scalars(trace.layer(1))["moved"])
            return loss + ait.balance_loss(self.model)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    batches = [(some_images(step), torch.arange(4)) for step in range(8)]
    logger = CSVLogger(str(tmp_path), name="run", flush_logs_every_n_steps=1)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[WorkspaceCallback(every=2)],
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert [count > 0 for count in module.hooks] == [True, True, False, False] * 2
    assert hook_count(module) == 0
    (file,) = tmp_path.rglob("metrics.csv")
    header, *lines = file.read_text().splitlines()
    names = header.split(",")
    expected = {f"workspace/model.blocks.{i}.mlp.workspace/{name}" for i in range(2) for name in QUANTITIES}
    assert expected <= set(names)
    column = names.index("workspace/model.blocks.1.mlp.workspace/moved")
    values = [float(line.split(",")[column]) for line in lines if line.split(",")[column]]
    # The last batch of the optimiser steps 0 and 2; Lightning repeats what was logged last.
    assert values == pytest.approx([module.moved[index] for index in (1, 1, 5, 5)], rel=1e-6)


def test_an_exception_in_training_takes_the_callbacks_hooks_out() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from ait.recording.lightning import WorkspaceCallback

    class Failing(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise KeyError("mine")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[WorkspaceCallback(every=1)], **options)
    module = Failing()
    with pytest.raises(KeyError):
        trainer.fit(module, torch.utils.data.DataLoader([some_images()], batch_size=None))
    assert hook_count(module) == 0
