"""The part of a report that shows what the workspaces did: figures of ``ait.viz`` as pictures of the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

from report_content import RunContent
from report_figures import escape

from ait.recording import MemoryHistory, Trace, scalars

DPI = 150
MOST_IMAGES = 3
# What drawing raises where a recording does not hold what it should.
UNFIT = (ValueError, RuntimeError, TypeError, IndexError, AttributeError, KeyError)


def workspace_section(run: RunContent) -> str:
    """Figures of ``recording.npz`` and ``memory.npz``; nothing for a run that has neither."""
    if run.recording is None and run.history is None:
        return ""
    try:
        from ait import viz
    except ImportError as error:
        run.notes.append(f"What the workspaces did is not shown: {error}")
        return ""
    parts = []
    if run.recording is not None:
        parts += _recording(run, run.recording, viz)
    if run.history is not None:
        parts += _history(run, run.history, viz)
    return "".join(["<h2>Inside the workspaces</h2>", *parts]) if any(parts) else ""


def _recording(run: RunContent, trace: Trace, viz: Any) -> list[str]:
    try:
        recorded = trace[-1]
        images, middle = recorded.inputs, len(recorded) // 2
        layer = recorded[middle]
        if images is None or len(images) != layer.batch:
            raise ValueError("it holds no images of its own")
        table = _table(trace)
    except UNFIT as error:
        run.notes.append(f"recording.npz is not shown: {error}")
        return []
    shown = list(range(0, len(images), max(1, len(images) // MOST_IMAGES)))[:MOST_IMAGES]
    options: dict[str, Any] = {"image": shown, "theme": "transparent"}
    where = f"layer {escape(layer.name)}, the {'middle' if len(recorded) > 1 else 'only'} one"
    figures: list[tuple[str, str, Callable[[], Any]]] = [
        (
            "Patches that slots attend",
            f"In {where}: the patches that each slot takes, coloured by the gate, of the slots that take most; the "
            "number is how many. A slot takes few patches of the whole batch, and in most images none.",
            lambda: viz.plot_slots(trace, images, layer=middle, **options),
        ),
        (
            "Retrieval map",
            f"In {where}: the slot whose pattern each token is rebuilt from most, and its weight.",
            lambda: viz.plot_retrieval(trace, images, layer=middle, **options),
        ),
        (
            "Slot use",
            "The share of each slot in what the tokens are rebuilt from, and the number of slots in use in effect.",
            lambda: viz.plot_slot_use(trace, theme="transparent"),
        ),
        (
            "Energy descent",
            "Hopfield energy of the tokens at each retrieval step, more of them than the layers take.",
            lambda: viz.plot_energy(trace, theme="transparent"),
        ),
        (
            "Rollout",
            "Where the tokens after the last layer came from, by shares of attention: through self-attention alone, "
            "and through attention and workspace together, with slots followed to what they attend to in this batch.",
            lambda: viz.plot_rollout(trace, images, batch_share=1.0, **options),
        ),
    ]
    drawn = [_figure(run, title, text, draw) for title, text, draw in figures]
    intro = (
        f'<p class="pale">The kept weights in evaluation, on {len(images)} validation images at once, so that the '
        f"capacity is {layer.k} tokens a row. The write is computed and not kept.</p>"
    )
    return [intro, table, *drawn]


def _history(run: RunContent, history: MemoryHistory, viz: Any) -> list[str]:
    names = history.layer_names
    if len(history.steps) < 2 or not names:
        return []
    which = len(names) // 2
    text = f"The slots of layer {escape(names[which])}, epoch by epoch; step 0 is before training."
    return [
        _figure(
            run,
            "Memory over training",
            text,
            lambda: viz.plot_memory(history, layer=which, theme="transparent"),
            "memory.npz",
        )
    ]


def _figure(run: RunContent, title: str, text: str, draw: Callable[[], Any], source: str = "recording.npz") -> str:
    """A figure with a title and what to see in it; a note where it cannot be drawn."""
    try:
        content = io.BytesIO()
        figure = draw()
        figure.savefig(content, format="png", dpi=DPI)
    except UNFIT as error:
        run.notes.append(f"{source}: {title.lower()} is not shown: {error}")
        return ""
    picture = base64.b64encode(content.getvalue()).decode()
    widest = f"{7 * figure.get_figwidth():.0f}rem"
    return (
        f'<h3>{title}</h3><p class="pale">{text}</p><div class="scroll"><img class="drawn" style="max-width:{widest}" '
        f'alt="{title.lower()}" src="data:image/png;base64,{picture}"></div>'
    )


def _table(trace: Trace) -> str:
    rows = {layer.name: scalars(layer) for layer in trace[-1]}
    columns = list(dict.fromkeys(name for values in rows.values() for name in values if name != "balance_loss"))
    # Evaluation has neither a moving memory nor a balance loss.
    columns = [name for name in columns if any(values.get(name) for values in rows.values()) or name == "dead_slots"]
    head = "".join(f'<th class="number">{escape(name.replace("_", " "))}</th>' for name in columns)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="number">{values[each]:.4g}</td>' if each in values else "<td></td>" for each in columns)
        + "</tr>"
        for name, values in rows.items()
    )
    return f'<div class="scroll"><table><tr><th>layer</th>{head}</tr>{body}</table></div>'
