"""Trains a model on images: one file, one pass from top to bottom.

    python experiments/train.py --data digits --model ait_tiny
    python experiments/train.py --data cifar10 --data-dir data/cifar10 --model vit_tiny --out runs/cifar10-vit_tiny
    python experiments/train.py --data triangle --fresh --model ait_tiny --report

Every choice (here: the epoch whose weights are kept) is made on the validation split; the test set is read once, at the
end. A run's folder receives config.json, environment.json, metrics.jsonl (one line an epoch), TensorBoard events,
checkpoint.pt (the best weights), last.pt (what --resume needs), mistakes.npz, recording.npz and memory.npz (what the
workspaces did) and result.json. The same seed, threads and machine give the same numbers, whether the run was
interrupted or not: Ctrl-C saves, and the same command with --resume goes on.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from evaluation import confusion_matrix, question_results, worst_mistakes
from interrupt import Interrupt
from look_inside import LookInside
from report import write_report
from results import environment, git_revision, pack_right, wilson_interval, write_json
from run_config import RECIPES, Config, check, differences, recorded, resolve
from run_folder import (
    append_line,
    digest,
    keep_lines,
    load_checkpoint,
    load_weights,
    prepare_folder,
    save_arrays,
    save_checkpoint,
)
from torch import Tensor, nn

import ait
from ait.data import ImageSplits, load_images

try:
    import tyro
    from tqdm import tqdm
except ImportError as missing:
    raise ImportError(f'experiments: {missing}; pip install "associative-transformer[train]"') from missing

__all__ = ["RECIPES", "Config", "check", "resolve", "train"]


class Schedule(NamedTuple):
    """Learning rate of a step: linear warm-up to ``peak``, then half a cosine down to ``peak * final_ratio``."""

    steps: int
    warmup_steps: int
    peak: float
    final_ratio: float

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.peak * (self.final_ratio + (1 - self.final_ratio) * (1 + math.cos(math.pi * share)) / 2)


@dataclass
class Progress:
    """How far a run has come: what it needs to go on, besides weights, optimiser and random states."""

    epoch: int = 1
    """The one being trained."""
    steps: int = 0
    """Optimiser steps done in it."""
    seen: int = 0
    """Images of it."""
    correct: int = 0
    loss_sum: float = 0.0
    balance_sum: float = 0.0
    epoch_seconds: float = 0.0
    """Spent on it, over all sittings."""
    seconds: float = 0.0
    """Spent on the whole run, over all sittings."""
    rates: list[float] = field(default_factory=list)
    """Images a second of each epoch."""
    best: dict[str, Any] | None = None
    """Metrics of the epoch whose weights are kept."""
    revisions: list[str | None] = field(default_factory=list)
    """Commits of the code of each sitting, where it changed."""

    def next_epoch(self) -> Progress:
        """At the start of the next epoch."""
        kept = {"seconds": self.seconds, "rates": self.rates, "best": self.best, "revisions": self.revisions}
        return Progress(epoch=self.epoch + 1, **kept)


def train(config: Config, progress: bool = True) -> dict[str, Any]:
    """Trains a model, keeps the weights of the best validation accuracy, and tests them once.

    Returns:
        What ``result.json`` holds.

    Raises:
        ValueError, OSError, ImportError, TypeError: the options, data or folders do not allow the run; before any work.
        OSError: the disk is full; the last checkpoint stays.
        FloatingPointError: the loss is NaN or infinite.
        Interrupt: Ctrl-C or SIGTERM; all is saved.
    """
    config = resolve(config)
    check(config)
    revision = git_revision()  # now: the checkout may move on while the run goes on
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.resume and (config.out / "result.json").exists():
        raise ValueError(f"train: expected an unfinished run to resume, got {config.out}, which has its result.json")
    saved = load_checkpoint(config.out / "last.pt") if config.resume else None
    if saved is not None and (changes := differences(saved["config"], recorded(config))):
        raise ValueError(f"train: expected the options of the run in {config.out} to resume it: {'; '.join(changes)}")
    run = Run(config)
    if saved is not None:
        run.load_state(saved)
        keep_lines(config.out / "metrics.jsonl", run.progress.epoch - 1)
    else:
        prepare_folder(config.out)
        write_json(config.out / "config.json", recorded(config))
        write_json(config.out / "environment.json", environment() | {"git_revision": revision})
    revisions = run.progress.revisions
    if not revisions or revisions[-1] != revision:
        if revisions:
            print(f"train: the run goes on with other code: {revisions[-1]} before, {revision} now", file=sys.stderr)
        revisions.append(revision)
    tensorboard = open_tensorboard(config.out, run.progress.epoch)

    # The bar's first estimate of the time left comes with its first update; a log file gets a line every ten seconds.
    interval = 0.2 if sys.stderr.isatty() else 10
    shown = {"desc": config.model, "unit": "batch", "disable": not progress, "mininterval": interval}
    bar = tqdm(total=run.schedule.steps, initial=run.first_step(), **shown)
    with bar, Interrupt.watched() as interrupt:
        while run.progress.epoch <= config.epochs:
            metrics = train_epoch(run, bar, interrupt)
            loss, logits = evaluate(run.model, run.splits.validation, run.splits, config)
            accuracy = (logits.argmax(1) == run.splits.validation.labels).double().mean().item()
            # Of equal ones the later, which has been trained for longer.
            is_best = run.progress.best is None or accuracy >= run.progress.best["validation_accuracy"]
            inside = run.inside.record(metrics["epoch"], config.out, keep=is_best)
            run.sit()
            metrics |= {
                "validation_loss": loss,
                "validation_accuracy": accuracy,
                "images_per_second": run.progress.rates[-1],
                "seconds": run.progress.seconds,
            }
            append_line(config.out / "metrics.jsonl", metrics)
            if tensorboard is not None:
                for name, value in (metrics | {f"workspace/{name}": value for name, value in inside.items()}).items():
                    tensorboard.add_scalar(name, value, metrics["epoch"])
            if is_best:
                run.progress.best = metrics
                save_checkpoint(config.out / "checkpoint.pt", run.facts() | {"epoch": metrics["epoch"]})
                mistakes = worst_mistakes(run.splits.validation, logits, "validation")
                save_arrays(config.out / "mistakes.npz", mistakes)
            run.progress = run.progress.next_epoch()
            run.save()
            interrupt.check()
    if tensorboard is not None:
        tensorboard.close()
    result = test(run)
    write_json(config.out / "result.json", result)
    if config.report:
        write_report(config.out)
    return result


class Run:
    """All that changes while a model is trained.

    Raises:
        ValueError, OSError, ImportError, TypeError: the options or data do not allow the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        generated = {"fresh": config.fresh, "seed": config.seed}
        self.splits = load_images(config.data, config.data_dir, config.download, img_size=config.img_size, **generated)
        # Other images with the same labels pass.
        self.data_digest = digest([self.splits.train.labels, self.splits.test.labels])
        images = len(self.splits.train)
        self.step_images = config.batch_size * config.accumulate
        if self.step_images > images:
            times = f" times accumulate {config.accumulate}" if config.accumulate > 1 else ""
            raise ValueError(
                f"train: expected a batch size of at most {images // config.accumulate}, the training images of "
                f"{config.data}, got {config.batch_size}{times}"
            )
        torch.manual_seed(config.seed)  # initial weights and dropout
        self.generator = torch.Generator().manual_seed(config.seed)  # order of the images and augmentation
        self.epoch_generator = self.generator.get_state()  # as it was before the epoch
        self.model, self.model_arguments = make_model(config, self.splits)
        self.model.to(config.device)
        self.model_in_training = torch.compile(self.model) if config.compile else self.model
        self.inside = LookInside(
            self.model, self.splits.validation, lambda *batch: prepare(*batch, self.splits, config)
        )
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config.weight_decay), lr=config.lr)
        self.device_type = torch.device(config.device).type
        self.amp_dtype = amp_dtype(self.device_type) if config.amp else None
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.amp_dtype == torch.float16)
        self.steps_per_epoch = images // self.step_images
        self.schedule = Schedule(
            config.epochs * self.steps_per_epoch,
            round(config.warmup_epochs * self.steps_per_epoch),
            config.lr,
            config.final_lr_ratio,
        )
        self.progress = Progress()
        self.sitting = time.perf_counter()
        self.saved_at = time.perf_counter()

    def first_step(self) -> int:
        """Steps done before this sitting."""
        return (self.progress.epoch - 1) * self.steps_per_epoch + self.progress.steps

    def sit(self) -> None:
        """Books the seconds since the last call on the epoch and the run."""
        now = time.perf_counter()
        self.progress.epoch_seconds += now - self.sitting
        self.progress.seconds += now - self.sitting
        self.sitting = now

    def facts(self) -> dict[str, Any]:
        """The weights, and what makes their model again."""
        return {
            "state_dict": self.model.state_dict(),
            "model": self.config.model,
            "model_arguments": self.model_arguments,
            "config": recorded(self.config),
        }

    def save(self) -> None:
        """Writes ``last.pt``, from which :meth:`load_state` goes on bit for bit."""
        self.sit()
        cuda = torch.cuda.get_rng_state_all() if self.device_type == "cuda" else []
        content = self.facts() | {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "generator": self.generator.get_state(),
            "epoch_generator": self.epoch_generator,
            "random": torch.get_rng_state(),
            "random_cuda": cuda,
            "random_mps": [torch.mps.get_rng_state()] if self.device_type == "mps" else [],
            "data_digest": self.data_digest,
            "inside": self.inside.state_dict(),
        }
        save_checkpoint(self.config.out / "last.pt", content)
        self.saved_at = time.perf_counter()

    def load_state(self, saved: dict[str, Any]) -> None:
        """Goes back to where :meth:`save` was called.

        Raises:
            ValueError: the data are others than those of the run.
        """
        if saved["data_digest"] != self.data_digest:
            raise ValueError(f"train: expected the data of the run to resume it, got others in {self.config.data}")
        self.model.load_state_dict(saved["state_dict"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.inside.load_state_dict(saved.get("inside"))
        self.progress = Progress(**saved["progress"])
        self.generator.set_state(saved["generator"])
        self.epoch_generator = saved["epoch_generator"]
        torch.set_rng_state(saved["random"])
        if self.device_type == "cuda":
            torch.cuda.set_rng_state_all(saved["random_cuda"])
        if self.device_type == "mps":
            torch.mps.set_rng_state(saved["random_mps"][0])


def train_epoch(run: Run, bar: tqdm, interrupt: Interrupt) -> dict[str, float]:
    """Goes once through the training images, or through the rest of them after an interruption.

    Returns:
        Epoch, last learning rate, mean loss, accuracy and balance loss.
    """
    config, done = run.config, run.progress
    run.model.train()
    has_workspace = any(isinstance(module, ait.GlobalWorkspace) for module in run.model.modules())
    images = run.splits.training_set(done.epoch)
    if done.steps == 0:
        run.epoch_generator = run.generator.get_state()
        batches = iter(images.batches(config.batch_size, generator=run.generator, drop_last=True))
    else:
        # The order of the epoch is drawn again, and the batches that were trained on are passed over.
        now = run.generator.get_state()
        run.generator.set_state(run.epoch_generator)
        batches = iter(images.batches(config.batch_size, generator=run.generator, drop_last=True))
        next(itertools.islice(batches, done.steps * config.accumulate - 1, None))
        run.generator.set_state(now)
    while done.steps < run.steps_per_epoch:
        step = (done.epoch - 1) * run.steps_per_epoch + done.steps
        rate = run.schedule(step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.zero_grad()
        for pixels, *questions, labels in itertools.islice(batches, config.accumulate):
            inputs = prepare(run.splits.augment(pixels, run.generator), questions, run.splits, config)
            labels = labels.to(config.device)
            with torch.autocast(run.device_type, run.amp_dtype, enabled=config.amp):
                logits = run.model_in_training(*inputs)  # (B, classes)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            balance = ait.balance_loss(run.model) if has_workspace else torch.zeros_like(loss)
            objective = loss + balance
            if not math.isfinite(objective.item()):
                raise FloatingPointError(
                    f"train: expected a finite loss, got {loss.item()} with balance loss {balance.item()} at step "
                    f"{step} of {run.schedule.steps}, learning rate {rate:.3g}; a lower --lr may help"
                )
            run.scaler.scale(objective / config.accumulate).backward()
            done.seen += len(labels)
            done.correct += int((logits.argmax(1) == labels).sum())
            done.loss_sum += loss.item() * len(labels)
            done.balance_sum += balance.item() * len(labels)
        if config.clip_norm:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()

        done.steps += 1
        shown = {"loss": done.loss_sum, "accuracy": done.correct, "balance": done.balance_sum}
        bar.set_postfix({name: f"{value / done.seen:.3f}" for name, value in shown.items()}, refresh=False)
        bar.update()
        if done.steps < run.steps_per_epoch and (
            interrupt.requested or time.perf_counter() - run.saved_at > 60 * config.save_minutes
        ):
            run.save()
            interrupt.check()
    run.sit()
    done.rates.append(done.seen / done.epoch_seconds)
    return {
        "epoch": done.epoch,
        "lr": rate,
        "train_loss": done.loss_sum / done.seen,
        "train_accuracy": done.correct / done.seen,
        "balance_loss": done.balance_sum / done.seen,
    }


def prepare(pixels: Tensor, questions: list[Tensor], splits: ImageSplits, config: Config) -> list[Tensor]:
    """A batch of bytes, and the questions to it if there are any, as a model takes them."""
    images = splits.normalize(pixels.to(config.device))
    if config.blank_images:
        images = torch.zeros_like(images)
    return [images, *(question.to(config.device) for question in questions)]


@torch.no_grad()
def evaluate(model: nn.Module, data: Any, splits: ImageSplits, config: Config) -> tuple[float, Tensor]:
    """Mean cross-entropy, and the logits of each image ``(n, classes)`` on the CPU."""
    model.eval()
    loss_sum, answers = 0.0, []
    for pixels, *questions, labels in data.batches(config.batch_size):
        logits = model(*prepare(pixels, questions, splits, config))
        loss_sum += F.cross_entropy(logits, labels.to(config.device), reduction="sum").item()
        answers.append(logits.cpu())
    return loss_sum / len(data), torch.cat(answers)


def test(run: Run) -> dict[str, Any]:
    """Reads the test set, once, with the weights that were kept."""
    config, test_set, best = run.config, run.splits.test, run.progress.best
    assert best is not None
    run.model.load_state_dict(load_checkpoint(config.out / "checkpoint.pt")["state_dict"])
    loss, logits = evaluate(run.model, test_set, run.splits, config)
    predictions = logits.argmax(1)
    save_arrays(config.out / "mistakes.npz", worst_mistakes(test_set, logits, "test"))
    right = predictions == test_set.labels
    correct = int(right.sum())
    return {
        "run": config.out.name,
        "model": config.model,
        "data": config.data,
        "test_accuracy": correct / len(test_set),
        "test_interval_95": wilson_interval(correct, len(test_set)),
        "test_correct": correct,
        "test_images": len(test_set),
        "test_loss": loss,
        "validation_accuracy": best["validation_accuracy"],
        "kept_epoch": best["epoch"],
        "epochs": config.epochs,
        "parameters": ait.count_parameters(run.model).parameters,
        "images_per_second": sorted(run.progress.rates)[len(run.progress.rates) // 2],
        "seconds": run.progress.seconds,
        **question_results(run.splits, predictions),
        "config": recorded(config),
        "git_revision": run.progress.revisions[0],
        "git_revisions": run.progress.revisions,  # more than one where the run went on with other code
        "environment": environment(),
        "confusion": confusion_matrix(test_set, predictions).tolist(),  # rows: true class; columns: what was answered
        "test_right": pack_right(right),
    }


def make_model(config: Config, splits: ImageSplits) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the arguments of ``ait.create_model`` that make it again."""
    channels, height, width = splits.train.image_shape
    arguments: dict[str, Any] = {
        "img_size": (height, width),
        "patch_size": config.patch_size,
        "in_chans": channels,
        "num_classes": len(splits.train.classes),
    }
    if splits.question_dim is not None:
        arguments["question_dim"] = splits.question_dim
    for option in config.options:
        name, separator, text = option.partition("=")
        if not separator:
            raise ValueError(f"train: expected options as NAME=VALUE, got {option!r}")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[name] = text
    model = ait.create_model(config.model, **arguments)
    if config.init_from is not None and not config.resume:
        load_weights(model, config.init_from)
    return model, arguments


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trainable if each.dim() >= 2], "weight_decay": weight_decay},
        {"params": [each for each in trainable if each.dim() < 2], "weight_decay": 0.0},
    ]


def amp_dtype(device_type: str) -> torch.dtype:
    """bfloat16, or float16 on a GPU that computes no bfloat16."""
    return torch.float16 if device_type == "cuda" and not torch.cuda.is_bf16_supported(False) else torch.bfloat16


def open_tensorboard(folder: Path, first_epoch: int) -> Any:
    """A writer of TensorBoard events, or None and a word about it where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print('train: no TensorBoard events; pip install "associative-transformer[train]" for them', file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=first_epoch if first_epoch > 1 else None)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        result = train(config)
    except (Interrupt, KeyboardInterrupt) as interrupt:
        folder = resolve(config).out
        if not (folder / "last.pt").exists() or (folder / "result.json").exists():
            raise SystemExit("\nStopped.") from interrupt
        arguments = [each for each in sys.argv if each not in ("--overwrite", "--resume")]
        command = shlex.join(["python", *arguments, "--resume"])
        saved = "all is saved" if isinstance(interrupt, Interrupt) else "what was saved last stays"
        print(f"\nStopped; {saved}. To go on:\n  {command}", file=sys.stderr)
        raise SystemExit(130) from interrupt
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    low, high = result["test_interval_95"]
    print(
        f"{result['run']}: test accuracy {100 * result['test_accuracy']:.2f} % "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f}), {result['parameters']:,} parameters"
    )
    for kind, each in result.get("test_by_kind", {}).items():
        accuracy, low, high, without, always = (
            100 * value
            for value in (
                each["accuracy"],
                *each["interval_95"],
                each["question_only_accuracy"],
                each["majority_accuracy"],
            )
        )
        print(
            f"  {kind}: {accuracy:.2f} % ({low:.2f} to {high:.2f}); "
            f"the best without images {without:.2f} %, the same answer always {always:.2f} %"
        )


if __name__ == "__main__":
    main()
