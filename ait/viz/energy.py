"""How Hopfield energy falls as tokens are retrieved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ait.ops._checks import op_error
from ait.recording.trace import LayerRecord, Trace, check_trace
from ait.viz.style import OKABE_ITO, Theme, check_width, new_figure, short_name, style

NAME = "plot_energy"
STYLES = ("-", "--", "-.", ":")


def plot_energy(
    trace: Trace,
    *,
    index: int = -1,
    layers: Sequence[str | int] | str | int | None = None,
    theme: Theme = "light",
    width: float = 4.5,
) -> Figure:
    """Energy of the tokens at each retrieval step: median, and the range of the middle 90 % of tokens.

    Follows as many steps as the trace was recorded with (``energy_steps``), else shows before and after. Padding is
    left out.

    Args:
        trace: a recording.
        index: which pass of the trace.
        layers: indices or names; all by default.
        theme: ``"light"``, ``"dark"`` or ``"transparent"``.
        width: of the figure in inches.

    Returns:
        The figure.

    Raises:
        ValueError: the trace is empty, has no such layer, or none with an energy (attention readers have none).
    """
    recorded = check_trace(NAME, trace)[index]
    width = check_width(NAME, width)
    if layers is None:
        chosen = list(recorded)
    elif isinstance(layers, Iterable) and not isinstance(layers, str):
        chosen = [recorded[layer] for layer in layers]
    else:
        chosen = [recorded[layers]]
    paths = [(layer, path) for layer in chosen if (path := _path(layer)) is not None]
    if not paths:
        raise op_error(NAME, "a layer that retrieves by Hopfield energy and saw tokens", "none")

    with style(theme):
        figure = new_figure(width, 0.62 * width + 0.2)
        axes = figure.subplots()
        lowest, highest = float("inf"), 0.0
        for number, (layer, path) in enumerate(paths):
            colour = OKABE_ITO[number % len(OKABE_ITO)]
            low, middle, high = torch.quantile(path, torch.tensor([0.05, 0.5, 0.95]), dim=1)
            steps = range(path.shape[0])
            axes.fill_between(steps, low.numpy(), high.numpy(), color=colour, alpha=0.2, linewidth=0)
            line = STYLES[number // len(OKABE_ITO) % len(STYLES)]
            axes.plot(steps, middle.numpy(), line, color=colour, label=short_name(layer.name), marker="o", markersize=3)
            lowest, highest = min(lowest, float(low.min())), max(highest, float(high.max()))
        if lowest > 0 and highest / lowest > 20:
            axes.set_yscale("log")
        longest = max(path.shape[0] for _, path in paths)
        axes.set_xticks(range(0, longest, max(1, longest // 8)))
        axes.set_xlabel("retrieval step")
        axes.set_ylabel("energy")
        axes.grid(axis="y")
        axes.legend(ncols=1 + (len(paths) > 8), fontsize=7, title="median, middle 90 %", title_fontsize=7)
    return figure


def _path(layer: LayerRecord) -> Tensor | None:
    """``(steps, tokens)`` on the CPU; None where the layer has no energy, or saw nothing but padding."""
    path = layer.energy_path
    if path is None:
        if layer.energy_before is None or layer.energy_after is None:
            return None
        path = torch.stack([layer.energy_before, layer.energy_after])
    path = path.detach()[:, layer.heard].float().cpu()
    return path if path.shape[1] else None
