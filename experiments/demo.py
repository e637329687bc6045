"""Trains an Associative Transformer and a ViT of the same shell on real handwritten digits, and draws how they fared.

    python experiments/demo.py

Both get the same recipe, seed and data; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import comparison
from run_folder import check_folder
from train import Config, train, tyro

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as missing:
    raise ImportError(f'demo: {missing}; pip install "associative-transformer[viz]"') from missing

MODELS = ("ait_tiny", "vit_tiny")
COLOURS = ("#0072B2", "#D55E00")  # blue and vermilion of Okabe and Ito, told apart by colour-blind readers, too
INK, PALE = "#222222", "#8a8a8a"


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo."""

    out: Path = Path("runs/demo")
    """Folder for both runs and the picture; runs that are there are replaced."""
    epochs: int | None = None
    """Passes through the training images; the recipe's number by default."""
    seed: int = 0
    threads: int = 1
    """CPU threads. One is enough for so little, and a machine that is busy with other work hardly slows it down."""


def run(config: DemoConfig, progress: bool = True) -> Path:
    """Trains both models, prints a table, and returns the picture's path."""
    check_folder(config.out, overwrite=True)
    results, curves = [], []
    for model in MODELS:
        folder = config.out / model
        options = {"seed": config.seed, "epochs": config.epochs, "threads": config.threads}
        results.append(train(Config(model=model, data="digits", out=folder, overwrite=True, **options), progress))
        curves.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    print(table(results))
    print(f"\n{comparison(*results)}.")
    picture = config.out / "digits.png"
    draw(results, curves).savefig(picture, dpi=160)
    print(f"Curves and confusion matrices: {picture}")
    return picture


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal, one line a model."""
    lines = [f"{'':<10}{'parameters':>12}{'test accuracy':>15}{'95 % interval':>18}{'images/s':>10}{'seconds':>9}"]
    for result in results:
        low, high = result["test_interval_95"]
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(
            f"{result['model']:<10}{result['parameters']:>12,}{100 * result['test_accuracy']:>13.1f} %{interval:>18}"
            f"{result['images_per_second']:>10,.0f}{result['seconds']:>9.0f}"
        )
    return "\n".join(lines)


def draw(results: Sequence[Mapping[str, Any]], curves: Sequence[Sequence[Mapping[str, float]]]) -> Figure:
    """Loss and accuracy by epoch, and one confusion matrix a model."""
    figure = Figure(figsize=(11, 9.6), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.05, wspace=0.05)
    images = results[0]["test_images"]
    figure.suptitle(
        f"Handwritten digits: {' and '.join(MODELS)}, the same recipe", fontsize=15, color=INK, fontweight="bold"
    )
    axes = figure.subplots(2, 2, height_ratios=(1, 1.35))
    _draw_curves(axes[0, 0], curves, "loss", "cross-entropy (log scale)")
    axes[0, 0].set_yscale("log")
    _draw_curves(axes[0, 1], curves, "accuracy", "accuracy")
    lowest = min(line[f"{split}_accuracy"] for curve in curves for line in curve for split in ("train", "validation"))
    axes[0, 1].set_ylim(max(0.0, lowest - 0.05), 1.01)
    axes[0, 0].legend(frameon=False, fontsize=10, labelcolor=INK)
    for axis, result in zip(axes[1], results, strict=True):
        _draw_confusion(axis, result["confusion"])
        low, high = result["test_interval_95"]
        axis.set_title(
            f"{result['model']}: {result['test_correct']} of {images} test images right, "
            f"{100 * result['test_accuracy']:.1f} %\n95 % interval {100 * low:.1f} to {100 * high:.1f}",
            fontsize=11,
            color=INK,
        )
    return figure


def _draw_curves(axis: Axes, curves: Sequence[Sequence[Mapping[str, float]]], quantity: str, title: str) -> None:
    for model, colour, curve in zip(MODELS, COLOURS, curves, strict=True):
        epochs = [line["epoch"] for line in curve]
        for split, label, style, width in (
            ("validation", "validation", "-", 2.2),
            ("train", "train, augmented", ":", 1.8),
        ):
            values = [line[f"{split}_{quantity}"] for line in curve]
            axis.plot(epochs, values, style, color=colour, lw=width, label=f"{model}, {label}")
    axis.set_title(title, fontsize=11, color=INK)
    axis.set_xlabel("epoch", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(color="#e6e6e6", lw=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(PALE)
    axis.tick_params(color=PALE, labelcolor=INK)


def _draw_confusion(axis: Axes, confusion: Sequence[Sequence[int]]) -> None:
    """Counts on a square: what is right in blue, mistakes in orange."""
    counts = np.array(confusion)
    right = np.eye(len(counts), dtype=bool)
    highest = max(counts.max(), 1)
    # Less than linear, so that a single mistake shows beside the diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=1.15 * highest)
    for shown, colours in ((right, "Blues"), (~right, "Oranges")):
        axis.imshow(np.ma.masked_array(counts, ~shown | (counts == 0)), cmap=colours, norm=norm)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if count > highest / 4 else INK
            axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=10)
    axis.set_xlabel("answered", color=INK)
    axis.set_ylabel("true digit", color=INK)
    axis.set_xticks(range(len(counts)))
    axis.set_yticks(range(len(counts)))
    edges = np.arange(1, len(counts)) - 0.5
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="#f0f0f0", lw=1)
    axis.tick_params(which="both", length=0, labelcolor=INK)
    axis.spines[:].set_color("#d0d0d0")


def main() -> None:
    try:
        run(tyro.cli(DemoConfig, description=__doc__))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
