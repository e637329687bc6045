"""The memory over training."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.figure import Figure

from ait.ops._checks import op_error
from ait.recording.history import MemoryHistory
from ait.viz.style import OKABE_ITO, Theme, bare, check_width, new_figure, short_name, style

NAME = "plot_memory"


def plot_memory(history: MemoryHistory, *, layer: str | int = 0, theme: Theme = "light", width: float = 7.0) -> Figure:
    """How far slots moved, how like their start they are, and how like each other.

    Four panels: the L2 distance of slots from where they stood at the first step (median, middle 90 %, and the
    farthest and nearest); the cosine of each slot with its start at every step; the cosines between all slots at the
    first and at the last step.

    Args:
        history: at least two steps of it.
        layer: index or name.
        theme: ``"light"``, ``"dark"`` or ``"transparent"``.
        width: of the figure in inches; below 5, panels stand two by two.

    Returns:
        The figure.

    Raises:
        ValueError: the history has fewer than two steps or no such layer, or an argument is not as above.
    """
    expected = "an ait.MemoryHistory with at least two steps, each kept by log(step)"
    if not isinstance(history, MemoryHistory):
        raise op_error(NAME, expected, type(history).__name__)
    if len(history.steps) < 2:
        raise op_error(NAME, expected, f"one with {len(history.steps)}")
    distance, similarity, gram = history.distance(layer), history.similarity(layer), history.gram(layer)
    width, steps = check_width(NAME, width), history.steps
    name = layer if isinstance(layer, str) else history.layer_names[layer]

    with style(theme):
        wide = width >= 5
        figure = new_figure(width, 0.3 * width + 0.6 if wide else 0.95 * width + 0.4)
        panels = figure.subplots(1, 4, width_ratios=[1.3, 1.3, 1, 1]) if wide else figure.subplots(2, 2).flat
        moved, start, first, last = panels
        ranked = distance.float().sort(dim=1).values
        slots = ranked.shape[1]
        low, high = round(0.05 * (slots - 1)), round(0.95 * (slots - 1))
        moved.fill_between(steps, ranked[:, low].numpy(), ranked[:, high].numpy(), color=OKABE_ITO[0], alpha=0.25, lw=0)
        moved.plot(steps, ranked[:, slots // 2].numpy(), color=OKABE_ITO[0], label="median")
        moved.plot(steps, ranked[:, -1].numpy(), color=OKABE_ITO[3], linestyle="--", lw=1, label="farthest")
        moved.plot(steps, ranked[:, 0].numpy(), color=OKABE_ITO[2], linestyle=":", lw=1.2, label="nearest")
        moved.set_ylim(bottom=0)
        moved.set_title("distance from start")
        moved.set_xlabel("step")
        moved.grid(axis="y")
        moved.legend(fontsize=6, handlelength=1.6)
        # Columns of unequal width where the steps are uneven.
        middles = [(before + after) / 2 for before, after in itertools.pairwise(steps)]
        edges = [steps[0], *middles, max(steps[-1], steps[0] + 1)]
        colours: dict[str, Any] = dict(cmap="PuOr", vmin=-1, vmax=1)
        start.pcolormesh(edges, range(slots + 1), similarity.float().T.numpy(), **colours)
        start.set_title("cosine with start")
        start.set_xlabel("step")
        start.set_ylabel("slot")
        for axes, step in ((first, 0), (last, -1)):
            shown = axes.imshow(gram[step].float().numpy(), interpolation="nearest", **colours)
            axes.set_title(f"slots, step {steps[step]}")
            bare(axes)
        bar = figure.colorbar(shown, ax=[first, last] if wide else last, shrink=0.7, aspect=18, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("cosine")
        figure.suptitle(f"{short_name(name)}: the memory over training", fontsize=9)
    return figure
