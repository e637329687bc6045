"""How evenly slots are used, layer by layer."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from ait.nn._validate import check_number
from ait.ops._checks import op_error
from ait.recording.trace import Trace, check_trace
from ait.viz.style import OKABE_ITO, Theme, check_width, faint, ink, new_figure, short_name, style

NAME = "plot_slot_use"


def plot_slot_use(
    trace: Trace, *, index: int = -1, threshold: float = 0.01, theme: Theme = "light", width: float = 7.0
) -> Figure:
    """Share of each slot in what tokens are rebuilt from, sorted, and the number of slots in use in effect.

    Args:
        trace: a recording.
        index: which pass of the trace.
        threshold: slots with less than this part of an even share are dead, and marked.
        theme: ``"light"``, ``"dark"`` or ``"transparent"``.
        width: of the figure in inches.

    Returns:
        The figure: a heat map of layers and slots, the most used first, and the perplexity of each layer.

    Raises:
        ValueError: the trace is empty, no layer saw a token that is no padding, layers have different numbers of slots,
            or an argument is not as above.
    """
    layers = [layer for layer in check_trace(NAME, trace)[index] if layer.heard.any()]
    if not layers:
        raise op_error(NAME, "a pass in which a workspace saw tokens that are no padding", "one without")
    if len({layer.num_slots for layer in layers}) > 1:
        found = ", ".join(f"{layer.name}: {layer.num_slots}" for layer in layers)
        raise op_error(NAME, "layers with the same number of slots", f"{found}; record some of them with layers=")
    num_slots, width = layers[0].num_slots, check_width(NAME, width)
    threshold = check_number(NAME, "threshold", threshold, "[0, inf)")
    use = torch.stack([layer.slot_use.detach().cpu().float() for layer in layers]).sort(descending=True).values

    with style(theme):
        figure = new_figure(width, 0.28 * len(layers) + 1.15)
        left, right = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
        relative = num_slots * use
        shown = left.imshow(relative.numpy(), aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
        for row, values in enumerate(relative):
            dead = torch.nonzero(values < threshold).flatten().tolist()
            left.plot(dead, [row] * len(dead), "x", color="#ffffff", markersize=4)
        left.set_yticks(range(len(layers)), [short_name(layer.name) for layer in layers])
        left.set_xlabel("slots, most used first (x: dead)")
        left.tick_params(length=0)
        for spine in left.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(shown, ax=left, location="top", shrink=0.6, aspect=30, pad=0.03)
        bar.outline.set_visible(False)
        bar.set_label("use (1 = an even share)")
        perplexity = [float(layer.slot_perplexity) for layer in layers]
        right.barh(range(len(layers)), perplexity, color=OKABE_ITO[0], height=0.7)
        for row, value in enumerate(perplexity):
            inside = value > 0.5 * num_slots
            right.text(
                value + (-0.02 if inside else 0.02) * num_slots, row, f"{value:.1f}", va="center",
                ha="right" if inside else "left", fontsize=7, color="#ffffff" if inside else ink(),
            )  # fmt: skip
        right.axvline(num_slots, color=faint(), linewidth=0.8, linestyle="--")
        right.set_xlim(0, 1.03 * num_slots)
        right.set_xticks([0, num_slots])
        right.set_xlabel("perplexity")
        right.tick_params(axis="y", length=0, labelleft=False)
        right.spines["left"].set_visible(False)
    return figure
