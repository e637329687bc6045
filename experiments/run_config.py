"""Options of a run, what each data set asks for where they are silent, and which of them no run can have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from run_folder import check_folder

import ait
from ait.data import list_images

# What a data set asks for where the command line is silent. The digits' were chosen among trials, Triangle's learning
# rate among two (README.md); the others are untried or untuned.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"patch_size": 2, "epochs": 25, "batch_size": 64, "lr": 1e-3, "warmup_epochs": 2.0},
    "cifar10": {"patch_size": 4, "epochs": 10, "batch_size": 128, "lr": 1e-3, "warmup_epochs": 1.0},
    "cifar100": {"patch_size": 4, "epochs": 10, "batch_size": 128, "lr": 1e-3, "warmup_epochs": 1.0},
    "triangle": {"patch_size": 32, "epochs": 20, "batch_size": 64, "lr": 3e-4, "warmup_epochs": 1.0},
    "sort_of_clevr": {"patch_size": 15, "epochs": 4, "batch_size": 64, "lr": 3e-4, "warmup_epochs": 0.5},
    "oxford_pet": {"patch_size": 16, "epochs": 100, "batch_size": 128, "lr": 1e-3, "warmup_epochs": 5.0},
    "imagenet100": {"patch_size": 16, "epochs": 100, "batch_size": 128, "lr": 1e-3, "warmup_epochs": 5.0},
    "image_folder": {"patch_size": 16, "epochs": 30, "batch_size": 64, "lr": 1e-3, "warmup_epochs": 2.0},
}


@dataclass(frozen=True)
class Config:
    """Options of a run. None stands for what the data set's recipe says (RECIPES in run_config.py)."""

    model: str = "ait_tiny"
    """Name that ait.create_model knows."""
    data: str = "digits"
    """digits, cifar10, cifar100, triangle, sort_of_clevr, oxford_pet, imagenet100 or image_folder."""
    data_dir: Path | None = None
    """Folder with the data; digits, triangle and sort_of_clevr need none."""
    download: bool = False
    """Let torchvision download the data into --data-dir if it is not there."""
    img_size: int | None = None
    """Side in pixels to which photographs are brought (oxford_pet, imagenet100, image_folder)."""
    fresh: bool = False
    """Generate new training images for every epoch (triangle, sort_of_clevr)."""
    blank_images: bool = False
    """Show the model empty images: what can be answered without looking."""
    out: Path | None = None
    """Folder of this run, new or empty; runs/DATA-MODEL-SEED by default."""
    overwrite: bool = False
    """Replace the run that is in the folder."""
    resume: bool = False
    """Go on with the run that is in the folder, bit for bit; the other options as they were."""
    report: bool = False
    """Write report.html into the folder at the end (later: experiments/report.py FOLDER)."""
    init_from: Path | None = None
    """checkpoint.pt of an earlier run of the same model, to start from its weights."""
    options: tuple[str, ...] = ()
    """Further arguments of the model, as NAME=VALUE: num_slots=64 memory=learned."""
    patch_size: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    """Images of one forward pass."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step of the optimiser; each is a pool of its own for the workspace,
    and each is written into the memory."""
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
    device: str = "auto"
    """auto (CUDA, else MPS, else the CPU), or a device that torch knows."""
    amp: bool = False
    """Automatic mixed precision: bfloat16, or float16 with a gradient scaler on GPUs that are older."""
    compile: bool = False
    """torch.compile the training pass."""
    save_minutes: float = 10.0
    """Minutes between the checkpoints within an epoch; one is written at the end of every epoch, too."""


# What may differ between a run and its continuation, since it changes no number.
FREE_TO_DIFFER = ("data_dir", "download", "out", "overwrite", "resume", "report", "init_from", "save_minutes")


def resolve(config: Config) -> Config:
    """Fills in what the data set's recipe says, the device and the folder."""
    known = list_images()
    if config.data not in known:
        raise ValueError(f"train: expected data to be one of {', '.join(known)}, got {config.data!r}")
    recipe = {name: value for name, value in RECIPES[config.data].items() if getattr(config, name) is None}
    if "warmup_epochs" in recipe and config.epochs is not None:
        recipe["warmup_epochs"] = min(recipe["warmup_epochs"], config.epochs)  # of a run that is cut short
    out = config.out or Path("runs") / f"{config.data}-{config.model}-{config.seed}"
    device = best_device() if config.device == "auto" else config.device
    return dataclasses.replace(config, **recipe, out=Path(out), device=device)


def best_device() -> str:
    """``"cuda"`` where torch sees one, else ``"mps"``, else ``"cpu"``."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check(config: Config) -> None:
    """Refuses, before any work, options that no run can have."""
    if config.model not in ait.list_models():
        raise ValueError(f"train: expected model to be one of {', '.join(ait.list_models())}, got {config.model!r}")
    whole = {"patch_size": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "threads": 1, "seed": 0, "img_size": 1}
    for name, smallest in whole.items():
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < smallest):
            raise ValueError(f"train: expected {name} to be a whole number of at least {smallest}, got {value!r}")
    if config.seed >= 2**63:
        raise ValueError(f"train: expected seed to be a whole number below 2^63, got {config.seed}")
    largest = {"warmup_epochs": config.epochs, "final_lr_ratio": 1, "label_smoothing": 1}
    numbers = ("lr", "warmup_epochs", "final_lr_ratio", "weight_decay", "clip_norm", "label_smoothing", "save_minutes")
    for name in numbers:
        value, high = getattr(config, name), largest.get(name, math.inf)
        if not math.isfinite(value) or not 0 <= value <= high or (name == "lr" and value == 0):
            expected = "above 0" if name == "lr" else f"from 0 to {high}"
            raise ValueError(f"train: expected {name} to be a finite number {expected}, got {value!r}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without that device
        raise ValueError(f"train: expected a device that torch has here, got {config.device!r}: {error}") from error
    if config.amp and not torch.amp.is_autocast_available(torch.device(config.device).type):
        raise ValueError(f"train: expected a device that has autocast for --amp, got {config.device!r}")
    if config.resume and config.overwrite:
        raise ValueError("train: expected --resume or --overwrite, got both")
    check_folder(config.out, config.overwrite or config.resume)


def recorded(config: Config) -> dict[str, Any]:
    """The config as plain types. Of a path only its last part: where a folder was is nobody else's business."""
    items = dataclasses.asdict(config).items()
    return {
        name: value.name if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in items
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a run's recorded config is otherwise now, in words; empty where the run can go on."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in FREE_TO_DIFFER and before.get(name) != now.get(name)
    ]
