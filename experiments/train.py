"""Trains a model on images: one file, one pass from top to bottom.

    python experiments/train.py --data digits --model ait_tiny
    python experiments/train.py --data cifar10 --data-dir data/cifar10 --model vit_tiny --out runs/cifar10-vit_tiny

Every choice (here: the epoch whose weights are kept) is made on the validation split; the test set is read once, at the
end. A run's folder receives config.json, metrics.jsonl (one line an epoch), TensorBoard events, checkpoint.pt and
result.json. The same seed, threads and machine give the same numbers.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from results import environment, git_revision, wilson_interval, write_json
from run_folder import check_folder, load_checkpoint, load_weights, prepare_folder, save_checkpoint
from torch import Tensor, nn

import ait
from ait.data import ImageDataset, ImageSplits, list_images, load_images

try:
    import tyro
    from tqdm import tqdm
except ImportError as missing:
    raise ImportError(f'experiments: {missing}; pip install "associative-transformer[train]"') from missing

# What a data set asks for where the command line is silent; README.md says how these were chosen.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"patch_size": 2, "epochs": 25, "batch_size": 64, "lr": 1e-3, "warmup_epochs": 2.0},
    "cifar10": {"patch_size": 4, "epochs": 10, "batch_size": 128, "lr": 1e-3, "warmup_epochs": 1.0},
    "cifar100": {"patch_size": 4, "epochs": 10, "batch_size": 128, "lr": 1e-3, "warmup_epochs": 1.0},
}


@dataclass(frozen=True)
class Config:
    """Options of a run. None stands for what the data set's recipe says (RECIPES in train.py)."""

    model: str = "ait_tiny"
    """Name that ait.create_model knows."""
    data: str = "digits"
    """digits, cifar10 or cifar100."""
    data_dir: Path | None = None
    """Folder with the data (torchvision's, or contact sheets); the digits need none."""
    download: bool = False
    """Let torchvision download the data into --data-dir if it is not there."""
    out: Path | None = None
    """Folder of this run, new or empty; runs/DATA-MODEL-SEED by default."""
    overwrite: bool = False
    """Replace the run that is in the folder."""
    init_from: Path | None = None
    """checkpoint.pt of an earlier run of the same model, to start from its weights."""
    options: tuple[str, ...] = ()
    """Further arguments of the model, as NAME=VALUE: num_slots=64 memory=learned."""
    patch_size: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    """Learning rate at its peak."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up before the cosine."""
    final_lr_ratio: float = 0.01
    """Learning rate of the last step, as a share of the peak."""
    weight_decay: float = 0.05
    """Of the matrices; biases, norms and memories do not decay."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 = any."""
    label_smoothing: float = 0.0
    seed: int = 0
    threads: int | None = None
    """CPU threads; torch's choice by default."""
    device: str = "cpu"


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


def train(config: Config, progress: bool = True) -> dict[str, Any]:
    """Trains a model, keeps the weights of the best validation accuracy, and tests them once.

    Returns:
        What ``result.json`` holds.

    Raises:
        ValueError, OSError, ImportError, TypeError: the options, data or folders do not allow the run; before any work.
        FloatingPointError: the loss is NaN or infinite.
    """
    config = resolve(config)
    check(config)
    revision = git_revision()  # now: the checkout may move on while the run goes on
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    splits = load_images(config.data, config.data_dir, config.download)
    if config.batch_size > len(splits.train):
        raise ValueError(
            f"train: expected a batch size of at most {len(splits.train)}, the training images of {config.data}, "
            f"got {config.batch_size}"
        )
    torch.manual_seed(config.seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(config.seed)  # order of the images and augmentation
    model, model_arguments = make_model(config, splits)
    model.to(config.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr)
    prepare_folder(config.out)
    write_json(config.out / "config.json", recorded(config))
    tensorboard = open_tensorboard(config.out)

    steps_per_epoch = len(splits.train) // config.batch_size
    schedule = Schedule(
        config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch), config.lr, config.final_lr_ratio
    )
    best, rates, started = None, [], time.perf_counter()
    # The bar's first estimate of the time left comes with its first update; a log file gets a line every ten seconds.
    interval = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=schedule.steps, desc=config.model, unit="batch", disable=not progress, mininterval=interval) as bar:
        for epoch in range(1, config.epochs + 1):
            epoch_started = time.perf_counter()
            step = (epoch - 1) * steps_per_epoch
            metrics = train_epoch(model, optimizer, schedule, splits, generator, config, step, bar)
            rates.append(steps_per_epoch * config.batch_size / (time.perf_counter() - epoch_started))
            loss, predictions = evaluate(model, splits.validation, splits, config)
            metrics = {"epoch": epoch, **metrics, "validation_loss": loss}
            metrics["validation_accuracy"] = (predictions == splits.validation.labels).double().mean().item()
            metrics["images_per_second"] = rates[-1]
            metrics["seconds"] = time.perf_counter() - started
            with (config.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if tensorboard is not None:
                for name, value in metrics.items():
                    tensorboard.add_scalar(name, value, epoch)
            # Of equal ones the later, which has been trained for longer.
            if best is None or metrics["validation_accuracy"] >= best["validation_accuracy"]:
                best = metrics
                facts = {"model": config.model, "model_arguments": model_arguments, "config": recorded(config)}
                save_checkpoint(config.out, model, facts | {"epoch": epoch})
    if tensorboard is not None:
        tensorboard.close()

    seconds = time.perf_counter() - started
    model.load_state_dict(load_checkpoint(config.out / "checkpoint.pt")["state_dict"])
    test_loss, predictions = evaluate(model, splits.test, splits, config)
    correct = int((predictions == splits.test.labels).sum())
    classes = len(splits.test.classes)
    confusion = (splits.test.labels * classes + predictions).bincount(minlength=classes**2).view(classes, classes)
    result = {
        "run": config.out.name,
        "model": config.model,
        "data": config.data,
        "test_accuracy": correct / len(splits.test),
        "test_interval_95": wilson_interval(correct, len(splits.test)),
        "test_correct": correct,
        "test_images": len(splits.test),
        "test_loss": test_loss,
        "validation_accuracy": best["validation_accuracy"],
        "kept_epoch": best["epoch"],
        "epochs": config.epochs,
        "parameters": ait.count_parameters(model).parameters,
        "images_per_second": sorted(rates)[len(rates) // 2],
        "seconds": seconds,
        "config": recorded(config),
        "git_revision": revision,
        "environment": environment(),
        "confusion": confusion.tolist(),  # rows: true class; columns: what was answered
    }
    write_json(config.out / "result.json", result)
    return result


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    splits: ImageSplits,
    generator: torch.Generator,
    config: Config,
    first_step: int,
    bar: tqdm,
) -> dict[str, float]:
    """Goes once through the training images; mean loss, accuracy and balance loss, and the last learning rate."""
    model.train()
    has_workspace = any(isinstance(module, ait.GlobalWorkspace) for module in model.modules())
    batches = splits.train.batches(config.batch_size, generator=generator, drop_last=True)
    seen, correct, loss_sum, balance_sum = 0, 0, 0.0, 0.0
    for step, (images, labels) in enumerate(batches, first_step):
        rate = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = splits.augment(images, generator).to(config.device), labels.to(config.device)
        logits = model(splits.normalize(images))  # (B, classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        balance = ait.balance_loss(model) if has_workspace else torch.zeros_like(loss)
        objective = loss + balance
        if not math.isfinite(objective.item()):
            raise FloatingPointError(
                f"train: expected a finite loss, got {loss.item()} with balance loss {balance.item()} at step {step} "
                f"of {schedule.steps}, learning rate {rate:.3g}; a lower --lr may help"
            )
        optimizer.zero_grad()
        objective.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()

        seen += len(labels)
        correct += int((logits.argmax(1) == labels).sum())
        loss_sum += loss.item() * len(labels)
        balance_sum += balance.item() * len(labels)
        shown = {"loss": loss_sum / seen, "accuracy": correct / seen, "balance": balance_sum / seen}
        bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        bar.update()
    return {
        "lr": rate,
        "train_loss": loss_sum / seen,
        "train_accuracy": correct / seen,
        "balance_loss": balance_sum / seen,
    }


def resolve(config: Config) -> Config:
    """Fills in what the data set's recipe says, and the folder."""
    known = list_images()
    if config.data not in known:
        raise ValueError(f"train: expected data to be one of {', '.join(known)}, got {config.data!r}")
    recipe = {name: value for name, value in RECIPES[config.data].items() if getattr(config, name) is None}
    if "warmup_epochs" in recipe and config.epochs is not None:
        recipe["warmup_epochs"] = min(recipe["warmup_epochs"], config.epochs)  # of a run that is cut short
    out = config.out or Path("runs") / f"{config.data}-{config.model}-{config.seed}"
    return dataclasses.replace(config, **recipe, out=Path(out))


def check(config: Config) -> None:
    """Refuses, before any work, options that no run can have."""
    if config.model not in ait.list_models():
        raise ValueError(f"train: expected model to be one of {', '.join(ait.list_models())}, got {config.model!r}")
    for name, smallest in {"patch_size": 1, "epochs": 1, "batch_size": 1, "threads": 1, "seed": 0}.items():
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < smallest):
            raise ValueError(f"train: expected {name} to be a whole number of at least {smallest}, got {value!r}")
    if config.seed >= 2**63:
        raise ValueError(f"train: expected seed to be a whole number below 2^63, got {config.seed}")
    largest = {"warmup_epochs": config.epochs, "final_lr_ratio": 1, "label_smoothing": 1}
    for name in ("lr", "warmup_epochs", "final_lr_ratio", "weight_decay", "clip_norm", "label_smoothing"):
        value, high = getattr(config, name), largest.get(name, math.inf)
        if not math.isfinite(value) or not 0 <= value <= high or (name == "lr" and value == 0):
            expected = "above 0" if name == "lr" else f"from 0 to {high}"
            raise ValueError(f"train: expected {name} to be a finite number {expected}, got {value!r}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without that device
        raise ValueError(f"train: expected a device that torch has here, got {config.device!r}: {error}") from error
    check_folder(config.out, config.overwrite)


def recorded(config: Config) -> dict[str, Any]:
    """The config as plain types. Of a path only its last part: where a folder was is nobody else's business."""
    items = dataclasses.asdict(config).items()
    return {name: value.name if isinstance(value, Path) else value for name, value in items}


def make_model(config: Config, splits: ImageSplits) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the arguments of ``ait.create_model`` that make it again."""
    channels, height, width = splits.train.image_shape
    arguments: dict[str, Any] = {
        "img_size": (height, width),
        "patch_size": config.patch_size,
        "in_chans": channels,
        "num_classes": len(splits.train.classes),
    }
    for option in config.options:
        name, separator, text = option.partition("=")
        if not separator:
            raise ValueError(f"train: expected options as NAME=VALUE, got {option!r}")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[name] = text
    model = ait.create_model(config.model, **arguments)
    if config.init_from is not None:
        load_weights(model, config.init_from)
    return model, arguments


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trainable if each.dim() >= 2], "weight_decay": weight_decay},
        {"params": [each for each in trainable if each.dim() < 2], "weight_decay": 0.0},
    ]


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageDataset, splits: ImageSplits, config: Config) -> tuple[float, Tensor]:
    """Mean cross-entropy, and the class given to each image ``(n,)``."""
    model.eval()
    loss_sum, predictions = 0.0, []
    for images, labels in data.batches(config.batch_size):
        logits = model(splits.normalize(images.to(config.device)))
        loss_sum += F.cross_entropy(logits, labels.to(config.device), reduction="sum").item()
        predictions.append(logits.argmax(1).cpu())
    return loss_sum / len(data), torch.cat(predictions)


def open_tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard events, or None and a word about it where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print('train: no TensorBoard events; pip install "associative-transformer[train]" for them', file=sys.stderr)
        return None
    return SummaryWriter(str(folder))


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        result = train(config)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    low, high = result["test_interval_95"]
    print(
        f"{result['run']}: test accuracy {100 * result['test_accuracy']:.2f} % "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f}), {result['parameters']:,} parameters"
    )


if __name__ == "__main__":
    main()
