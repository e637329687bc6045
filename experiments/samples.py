"""Draws a page of sample images of a generated data set: of Sort-of-CLEVR with questions and answers in words.

python experiments/samples.py --data sort_of_clevr --out samples.png
python experiments/samples.py --data triangle --out samples.png --seed 1
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from ait.data import ImageDataset, QuestionDataset, decode_question, sort_of_clevr, triangle

try:
    import tyro
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as missing:
    raise ImportError(f'samples: {missing}; pip install "associative-transformer[train,viz]"') from missing

INK, PALE = "#222222", "#8a8a8a"
QUESTIONS_SHOWN = 2  # of each kind
LINE = 52  # characters of a question's line


@dataclass(frozen=True)
class SamplesConfig:
    """Options of the page."""

    data: str = "sort_of_clevr"
    """sort_of_clevr or triangle."""
    out: Path = Path("samples.png")
    """File of the picture; one that is there is replaced."""
    seed: int = 0


def run(config: SamplesConfig) -> Path:
    """Writes the page, and returns its path.

    Raises:
        ValueError: ``data`` names no generated data set, the seed is out of range, or matplotlib writes no files with
            this suffix.
        OSError: the file cannot be written.
    """
    if config.data == "sort_of_clevr":
        figure = draw_questions(sort_of_clevr(8, config.seed))
    elif config.data == "triangle":
        figure = draw_images(triangle(32, config.seed))
    else:
        raise ValueError(f"samples: expected data to be sort_of_clevr or triangle, got {config.data!r}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=120)
    return config.out


def draw_questions(data: QuestionDataset) -> Figure:
    """Eight images, each above the first two questions of each kind and their answers."""
    figure = Figure(figsize=(16, 12), layout="constrained")
    figure.suptitle("Sort-of-CLEVR", fontsize=16, color=INK)
    panels = figure.subplots(4, 4, height_ratios=(1, 0.55, 1, 0.55))
    for index in range(8):
        row, column = 2 * (index // 4), index % 4
        image, words = panels[row, column], panels[row + 1, column]
        _show(image, data, index)
        words.axis("off")
        asked = data.subset(data.image_index == index)
        lines = []
        for kind in asked.kinds.unique():
            of_kind = asked.subset(asked.kinds == kind)
            texts = map(decode_question, of_kind.questions, of_kind.labels.tolist())
            for text in list(dict.fromkeys(texts))[:QUESTIONS_SHOWN]:  # a question may come twice
                lines += textwrap.wrap(text, LINE, initial_indent="• ", subsequent_indent="   ")
        words.text(0, 1, "\n".join(lines), va="top", fontsize=9.5, color=INK, linespacing=1.35)
    return figure


def draw_images(data: ImageDataset) -> Figure:
    """Thirty-two images, each under the name of its class."""
    figure = Figure(figsize=(16, 9.5), layout="constrained")
    figure.suptitle("Triangle", fontsize=16, color=INK)
    for index, axes in enumerate(figure.subplots(4, 8).flat):
        _show(axes, data, index)
        axes.set_title(data.classes[int(data.labels[index])], fontsize=10, color=INK)
    return figure


def _show(axes: Axes, data: ImageDataset | QuestionDataset, index: int) -> None:
    axes.imshow(data.images[index].permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(PALE)


def main() -> None:
    config = tyro.cli(SamplesConfig, description=__doc__)
    try:
        print(f"Samples: {run(config)}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
