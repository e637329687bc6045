"""Which patches each slot takes, over the image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ait.ops._checks import check_positive_int, op_error
from ait.recording.trace import LayerRecord, Trace, check_trace
from ait.viz.images import choose_shown, extent, find_grid, show_faded, show_image, to_pixels
from ait.viz.style import Theme, add_bar, check_width, new_figure, short_name, style

NAME = "plot_slots"


def plot_slots(
    trace: Trace,
    images: Tensor,
    *,
    layer: str | int = -1,
    index: int = -1,
    image: Sequence[int] | int | None = None,
    slots: Sequence[int] | int | None = None,
    head: int | None = None,
    grid: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    theme: Theme = "light",
    width: float = 7.0,
) -> Figure:
    """The patches that slots take in the write, one row an image, one column a slot.

    Colour is the gate, the share of a slot's attention that a patch gets, as a mean over heads (or of one head). The
    bottleneck lets a slot take few tokens of the whole batch; in most images it takes none.

    Args:
        trace: a recording in which the layer's write was computed.
        images: ``(B, C, H, W)``, those of the recorded pass.
        layer: index or name.
        index: which pass of the trace.
        image: which images of the batch; the first three by default.
        slots: which slots, or how many: those that attend most to the images shown; as many as the width holds by
            default.
        head: which head of the write; the mean of all by default.
        grid: rows and columns of patches, where the recording does not know them.
        mean: of the channels, to undo a normalisation.
        std: the same for the standard deviation.
        theme: ``"light"``, ``"dark"`` or ``"transparent"``.
        width: of the figure in inches.

    Returns:
        The figure.

    Raises:
        ValueError: the trace is empty or has no such layer or write, the images are not those of the record, or
            another argument is not as above.
    """
    record = check_trace(NAME, trace).layer(layer, index)
    write = record.require_write(NAME)
    places = find_grid(NAME, record, images, grid)
    chosen = choose_shown(NAME, record, image)
    gates_SMT = write.dense_gates()
    heads = gates_SMT.shape[0]
    if head is not None and (not isinstance(head, int) or isinstance(head, bool) or not -heads <= head < heads):
        raise op_error(NAME, f"head from 0 to {heads - 1}, or None for their mean", repr(head))
    gates_MT = gates_SMT.mean(0) if head is None else gates_SMT[head]
    gates_MBN = record.by_image(gates_MT).detach().cpu().float()
    width = check_width(NAME, width)
    columns = _choose_slots(max(1, int(width / 0.85) - 1) if slots is None else slots, gates_MBN[:, chosen], record)

    with style(theme):
        cell = width / (len(columns) + 1.6)
        aspect = images.shape[2] / images.shape[3]
        figure = new_figure(width, len(chosen) * (cell * aspect + 0.2) + 0.5)
        axes = figure.subplots(len(chosen), len(columns) + 1, squeeze=False)
        # Where nothing of these images was taken, the bar runs to 1, as a gate may.
        largest = float(gates_MBN[columns][:, chosen].max()) or 1.0
        for row, number in enumerate(chosen):
            pixels = to_pixels(images[number], mean, std)
            show_image(axes[row, 0], pixels)
            axes[row, 0].set_title(f"image {number}", fontsize=7)
            for column, slot in enumerate(columns, 1):
                ax = axes[row, column]
                show_faded(ax, pixels)
                values = gates_MBN[slot, number]
                taken = places.place(values)
                shown = ax.imshow(
                    torch.from_numpy(taken).masked_fill(torch.from_numpy(taken) == 0, torch.nan).numpy(),
                    cmap="viridis",
                    vmin=0,
                    vmax=largest,
                    extent=extent(pixels),
                    interpolation="nearest",
                    alpha=0.85,
                )
                ax.set_title(_title(slot, values, places.prefix, first=row == 0), fontsize=7)
        add_bar(figure, shown, axes, "gate" + ("" if head is None else f" of head {head}"))
        figure.suptitle(f"{short_name(record.name)}: patches that slots take, and how many", fontsize=9)
    return figure


def _choose_slots(slots: Sequence[int] | int, gates_MBN: Tensor, record: LayerRecord) -> list[int]:
    if not isinstance(slots, Iterable):
        count = min(check_positive_int(NAME, "slots", slots), record.num_slots)
        return gates_MBN.sum((1, 2)).topk(count).indices.sort().values.tolist()
    chosen = list(slots)
    for slot in chosen:
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < record.num_slots:
            raise op_error(NAME, f"slots from 0 to {record.num_slots - 1}", repr(slot))
    if not chosen:
        raise op_error(NAME, "at least one slot", "none")
    return chosen


def _title(slot: int, values: Tensor, prefix: int, first: bool) -> str:
    """How many patches a slot takes, with a plus where it takes tokens before them, too."""
    count = int((values[prefix:] > 0).sum())
    text = f"{count}" + ("+" if bool((values[:prefix] > 0).any()) else "")
    return f"slot {slot}\n{text}" if first else text
