"""Which pattern each token fell to, over the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ait.recording.trace import Trace, check_trace
from ait.viz.images import Grid, choose_shown, extent, find_grid, show_image, to_pixels
from ait.viz.style import OKABE_ITO, Theme, add_bar, check_width, new_figure, on_colour, short_name, style

NAME = "plot_retrieval"
REST = "#8c8c8c"


def plot_retrieval(
    trace: Trace,
    images: Tensor,
    *,
    layer: str | int = -1,
    index: int = -1,
    image: Sequence[int] | int | None = None,
    grid: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    theme: Theme = "light",
    width: float = 7.0,
) -> Figure:
    """The slot that each token fell to (the largest of its retrieval weights), and how large that weight is.

    The slots that most tokens of the images fell to have colours of their own; the numbers of all stand in the patches
    where there is room.

    Args:
        trace: a recording.
        images: ``(B, C, H, W)``, those of the recorded pass.
        layer: index or name.
        index: which pass of the trace.
        image: which images of the batch; the first three by default.
        grid: rows and columns of patches, where the recording does not know them.
        mean: of the channels, to undo a normalisation.
        std: the same for the standard deviation.
        theme: ``"light"``, ``"dark"`` or ``"transparent"``.
        width: of the figure in inches.

    Returns:
        The figure.

    Raises:
        ValueError: the trace is empty or has no such layer, the images are not those of the record, or another
            argument is not as above.
    """
    record = check_trace(NAME, trace).layer(layer, index)
    places = find_grid(NAME, record, images, grid)
    chosen = choose_shown(NAME, record, image)
    width = check_width(NAME, width)
    slots = record.by_image(record.pattern).cpu()[chosen]
    weights = record.by_image(record.retrieval.amax(-1)).detach().cpu().float()[chosen]
    counts = np.bincount(slots[:, places.prefix :].flatten().numpy(), minlength=record.num_slots)
    order = [int(slot) for slot in np.argsort(-counts, kind="stable")[: len(OKABE_ITO)] if counts[slot]]
    colours = dict(zip(order, OKABE_ITO, strict=False))

    with style(theme):
        cell = (width - 0.9) / 3
        aspect = images.shape[2] / images.shape[3]
        figure = new_figure(width, len(chosen) * (cell * aspect + 0.08) + 1.0)
        axes = figure.subplots(len(chosen), 3, squeeze=False)
        for row, number in enumerate(chosen):
            pixels = to_pixels(images[number], mean, std)
            show_image(axes[row, 0], pixels)
            axes[row, 0].set_ylabel(f"image {number}", visible=True)
            show_image(axes[row, 1], _coloured(places.place(slots[row]), colours, pixels))
            _write_numbers(axes[row, 1], places.place(slots[row]), colours, pixels, places, cell)
            show_image(axes[row, 2], pixels)
            shown = axes[row, 2].imshow(
                places.place(weights[row]),
                cmap="cividis",
                vmin=1 / record.num_slots,
                vmax=max(float(weights.max()), 1.001 / record.num_slots),
                extent=extent(pixels),
                interpolation="nearest",
            )
        for ax, title in zip(axes[0], ("image", "slot", "weight of that slot"), strict=True):
            ax.set_title(title)
        add_bar(figure, shown, axes[:, 2])
        total = counts.sum()
        handles = [Patch(color=colours[slot], label=f"{slot}: {100 * counts[slot] / total:.0f} %") for slot in order]
        rest = total - sum(counts[slot] for slot in order)
        if rest:
            handles.append(Patch(color=REST, label=f"others: {100 * rest / total:.0f} %"))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=max(2, min(len(handles), int(width / 0.85))),
            handlelength=1, columnspacing=1.2, title="share of patches by slot", fontsize=7, title_fontsize=7,
        )  # fmt: skip
        figure.suptitle(f"{short_name(record.name)}: where tokens fell to", fontsize=9)
    return figure


def _coloured(slots: np.ndarray, colours: dict[int, str], pixels: np.ndarray) -> np.ndarray:
    """One colour a patch, as large as the image."""
    painted = np.array([[to_rgb(colours.get(int(slot), REST)) for slot in row] for row in slots])
    rows, columns = pixels.shape[0] // slots.shape[0], pixels.shape[1] // slots.shape[1]
    return painted.repeat(rows, axis=0).repeat(columns, axis=1)


def _write_numbers(
    axes: Axes, slots: np.ndarray, colours: dict[int, str], pixels: np.ndarray, grid: Grid, cell: float
) -> None:
    size = min(7.0, 72 * cell / grid.columns * 0.42)
    if size < 3.5:
        return
    height, width = pixels.shape[0] / grid.rows, pixels.shape[1] / grid.columns
    for (row, column), slot in np.ndenumerate(slots):
        place = ((column + 0.5) * width - 0.5, (row + 0.5) * height - 0.5)
        ink = on_colour(colours.get(int(slot), REST))
        axes.text(*place, str(slot), ha="center", va="center", fontsize=size, color=ink)
