"""Tests a model on the test images of a data set.

    python experiments/evaluate.py --model ait_tiny --pretrained cifar10 --data cifar10 --data-dir data/cifar10
    python experiments/evaluate.py --checkpoint runs/digits-ait_tiny-0/checkpoint.pt

prints the accuracy with its 95 % interval. With --check-card, it is compared with the figure that the weights state;
with --against vit_tiny, with what that model makes of the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from results import comparison, pack_right, wilson_interval
from run_folder import load_checkpoint
from torch import Tensor, nn

import ait
from ait.data import LabelledImages, QuestionDataset, load_images

try:
    import tyro
except ImportError as missing:
    raise ImportError(f'experiments: {missing}; pip install "associative-transformer[train]"') from missing

CARD_TOLERANCE = 0.001  # a tenth of a point: another processor rounds otherwise


@dataclass(frozen=True)
class Options:
    """Which weights, and which data."""

    model: str | None = None
    """Name that ait.create_model knows; a checkpoint says it itself."""
    pretrained: str | None = None
    """Weights of that model that come with the package: cifar10."""
    checkpoint: Path | None = None
    """checkpoint.pt of a run of train.py, in place of --pretrained."""
    data: str | None = None
    """By default, and at most, what the weights were trained on."""
    data_dir: Path | None = None
    """Folder with the data; what is generated, and the digits, need none."""
    download: bool = False
    """Let torchvision download the data into --data-dir if it is not there."""
    check_card: bool = False
    """Fail where the accuracy is off the weights' stated one by more than 0.1 points."""
    against: str | None = None
    """Another model with --pretrained weights, to compare with image by image."""
    batch_size: int = 128
    threads: int | None = None
    """CPU threads; torch's choice by default."""
    device: str = "cpu"


def evaluate(options: Options) -> dict[str, Any]:
    """Tests a model.

    Returns:
        ``run`` (which weights), ``data``, ``test_correct``, ``test_images``, ``test_accuracy``, ``test_interval_95``
        and ``test_right``, as in a run's ``result.json``.

    Raises:
        ValueError, OSError, ImportError, TypeError: options, weights or data do not allow it.
    """
    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.pretrained is not None:
        model = ait.create_model(options.model, pretrained=options.pretrained)
        config = ait.pretrained_config(f"{options.model}.{options.pretrained}")
        weights, trained_on, img_size = config.name, config.data, None
    else:
        checkpoint = load_checkpoint(options.checkpoint)
        model = model_of(checkpoint, options.checkpoint)
        if checkpoint["config"].get("blank_images"):
            raise ValueError(
                f"evaluate: expected a model that was shown its images, got {options.checkpoint} of a blind run"
            )
        img_size = checkpoint["config"].get("img_size")
        weights, trained_on = str(options.checkpoint), checkpoint["config"]["data"]
        if options.model not in (None, checkpoint["model"]):
            raise ValueError(f"evaluate: expected model {checkpoint['model']} for {weights}, got {options.model}")
    if options.data not in (None, trained_on):
        raise ValueError(f"evaluate: expected data {trained_on}, which {weights} was trained on, got {options.data}")
    splits = load_images(trained_on, options.data_dir, options.download, img_size=img_size)
    right = answers_right(
        model.to(options.device), splits.test, splits.normalize, batch_size=options.batch_size, device=options.device
    )
    correct = int(right.sum())
    return {
        "run": weights,
        "data": trained_on,
        "test_correct": correct,
        "test_images": len(splits.test),
        "test_accuracy": correct / len(splits.test),
        "test_interval_95": wilson_interval(correct, len(splits.test)),
        "test_right": pack_right(right),
    }


def check(options: Options) -> None:
    """Refuses options that do not say what to test."""
    if (options.pretrained is None) == (options.checkpoint is None):
        raise ValueError("evaluate: expected one of --pretrained and --checkpoint")
    if options.pretrained is not None and options.model is None:
        raise ValueError("evaluate: --pretrained needs --model")
    if options.check_card and options.pretrained is None:
        raise ValueError("evaluate: --check-card needs --pretrained: a checkpoint has no card")
    if options.against is not None and options.pretrained is None:
        raise ValueError("evaluate: --against needs --pretrained, whose weights both models get")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"evaluate: expected threads to be at least 1, got {options.threads}")


def model_of(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """The model of a checkpoint, with its weights.

    Raises:
        ValueError: the checkpoint does not say which model it is of, or its weights are of another.
    """
    missing = [fact for fact in ("model", "model_arguments", "config") if fact not in checkpoint]
    if missing:
        raise ValueError(f"evaluate: expected {path} to be a checkpoint of train.py, got no {', '.join(missing)}")
    model = ait.create_model(checkpoint["model"], **checkpoint["model_arguments"])
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"evaluate: {path}: expected the weights of {checkpoint['model']}, got: {error}") from error
    return model


@torch.no_grad()
def answers_right(
    model: nn.Module,
    data: LabelledImages | QuestionDataset,
    normalize: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 128,
    device: str = "cpu",
) -> Tensor:
    """``(n,)`` bool: images whose largest logit is that of their class; leaves the model in evaluation mode."""
    model.eval()
    right = []
    for images, *questions, labels in data.batches(batch_size):
        logits = model(normalize(images.to(device)), *(each.to(device) for each in questions))  # (B, classes)
        right.append(logits.argmax(1).cpu() == labels)
    return torch.cat(right)


def check_card(accuracy: float, stated: float) -> str:
    """One sentence on a measured accuracy and the stated one.

    Raises:
        ValueError: they differ by more than 0.1 points.
    """
    points = 100 * (accuracy - stated)
    sentence = f"the card states {100 * stated:.2f} %, {points:+.2f} points from it"
    if abs(accuracy - stated) > CARD_TOLERANCE + 1e-9:
        raise ValueError(
            f"evaluate: expected the card's accuracy to 0.1 points, got {100 * accuracy:.2f} %: {sentence}"
        )
    return sentence


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        asked = [options] if options.against is None else [options, replace(options, model=options.against)]
        results = [evaluate(each) for each in asked]
        for result in results:
            low, high = result["test_interval_95"]
            print(
                f"{result['run']} on {result['data']}: test accuracy {100 * result['test_accuracy']:.2f} % "
                f"(95 % interval {100 * low:.2f} to {100 * high:.2f}), {result['test_images']:,} images"
            )
            if options.check_card:
                print(check_card(result["test_accuracy"], ait.pretrained_config(result["run"]).test_accuracy))
        if options.against is not None:
            print(f"{comparison(*results)}.")
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
