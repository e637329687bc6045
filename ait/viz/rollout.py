"""Attention rollout over the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ait.ops._checks import op_error
from ait.recording.rollout import Rollout, attention_rollout
from ait.recording.trace import Trace, check_trace
from ait.viz.images import choose_shown, extent, find_grid, show_faded, show_image, to_pixels
from ait.viz.style import OKABE_ITO, Theme, add_bar, bare, check_width, new_figure, on_colour, style

NAME = "plot_rollout"
SOURCES = {"this image": OKABE_ITO[0], "other images": OKABE_ITO[1], "memory": OKABE_ITO[2]}


def plot_rollout(
    trace: Trace,
    images: Tensor,
    *,
    index: int = -1,
    image: Sequence[int] | int | None = None,
    token: int | None = None,
    batch_share: float | None = None,
    grid: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    theme: Theme = "light",
    width: float = 7.0,
) -> Figure:
    """Where tokens came from: rollout through self-attention alone, and through attention and workspace together.

    The bar says how much of the second is due to this image, to other images of the batch, and to the memory.

    Args:
        trace: recorded with ``attention=True``.
        images: ``(B, C, H, W)``, those of the recorded pass.
        index: which pass of the trace.
        image: which images of the batch; the first three by default.
        token: whose sources; the class token (the first token) where there are tokens before the patches, else the
            mean over all tokens, as the head of ait's models reads them all.
        batch_share: see :func:`ait.viz.attention_rollout`.
        grid: rows and columns of patches, where the recording does not know them.
        mean: of the channels, to undo a normalisation.
        std: the same for the standard deviation.
        theme: ``"light"``, ``"dark"`` or ``"transparent"``.
        width: of the figure in inches.

    Returns:
        The figure.

    Raises:
        ValueError: as :func:`ait.viz.attention_rollout`, or the images are not those of the record, or another
            argument is not as above.
    """
    record = check_trace(NAME, trace).layer(0, index)
    places = find_grid(NAME, record, images, grid)
    chosen = choose_shown(NAME, record, image)
    tokens = record.tokens_per_image
    whole = isinstance(token, int) and not isinstance(token, bool)
    if token is not None and (not whole or not -tokens <= token < tokens):
        raise op_error(NAME, f"token from 0 to {tokens - 1}, or None", repr(token))
    if token is None and places.prefix:
        token = 0
    width = check_width(NAME, width)
    plain = attention_rollout(trace, index=index, images=chosen, workspace_weight=0)
    together = attention_rollout(trace, index=index, images=chosen, batch_share=batch_share)

    with style(theme):
        cell = (width - 0.9) / 3.4
        aspect = images.shape[2] / images.shape[3]
        figure = new_figure(width, len(chosen) * (cell * aspect + 0.1) + 0.95)
        axes = figure.subplots(len(chosen), 4, width_ratios=[1, 1, 1, 0.4], squeeze=False)
        maps = [_sources(each, token) for each in (plain, together)]
        for row, number in enumerate(chosen):
            pixels = to_pixels(images[number], mean, std)
            show_image(axes[row, 0], pixels)
            for column, values in enumerate(maps, 1):
                show_faded(axes[row, column], pixels)
                seen = values[row] / values[row][places.prefix :].mean().clamp_min(1e-12)
                shown = axes[row, column].imshow(
                    places.place(seen),
                    cmap="viridis",
                    vmin=0,
                    vmax=_largest(maps, places.prefix),
                    extent=extent(pixels),
                    interpolation="nearest",
                    alpha=0.8,
                )
            _draw_shares(axes[row, 3], together, row, token)
            axes[row, 3].set_box_aspect(aspect / 0.4)
        for ax, title in zip(axes[0], ("image", "attention", "with workspace", "from"), strict=True):
            ax.set_title(title)
        add_bar(figure, shown, axes, "share (1 = mean patch)")
        handles = [Patch(color=colour, label=name) for name, colour in SOURCES.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1, fontsize=7)
        whose = "all tokens" if token is None else f"token {token}"
        figure.suptitle(f"rollout: sources of {whose}", fontsize=9)
    return figure


def _sources(rollout: Rollout, token: int | None) -> Tensor:
    """``(n, N)``."""
    return rollout.weights.mean(1) if token is None else rollout.weights[:, token]


def _largest(maps: list[Tensor], prefix: int) -> float:
    relative = [each[:, prefix:] / each[:, prefix:].mean(1, keepdim=True).clamp_min(1e-12) for each in maps]
    return float(torch.cat(relative).max())


def _draw_shares(axes: Axes, rollout: Rollout, row: int, token: int | None) -> None:
    bottom = 0.0
    parts = (rollout.weights[row].sum(1), rollout.others[row], rollout.memory[row])
    for values, colour in zip(parts, SOURCES.values(), strict=True):
        share = float(values.mean() if token is None else values[token])
        axes.bar(0, share, bottom=bottom, color=colour, width=0.9)
        if share > 0.08:
            said, ink = f"{100 * share:.0f} %", on_colour(colour)
            axes.text(0, bottom + share / 2, said, ha="center", va="center", fontsize=6, color=ink)
        bottom += share
    axes.set_ylim(0, 1)
    bare(axes)
