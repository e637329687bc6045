"""A pass as a few numbers, for logs."""

from __future__ import annotations

import torch
from torch import Tensor

from ait.recording.trace import LayerRecord, Pass


def scalars(recorded: Pass | LayerRecord) -> dict[str, float]:
    """The quantities of a recording that make one number a layer.

    - ``slot_perplexity``, ``dead_slots``: how many slots the tokens are rebuilt from in effect, and how many slots
      hardly any token is rebuilt from.
    - ``moved``: mean L2 distance by which slots moved.
    - ``energy_before``, ``energy_after``: mean Hopfield energy of the tokens, before and after retrieval.
    - ``balance_loss``, its weight inside.
    - Of the write: ``row_perplexity``, how many tokens a (head, slot) row takes in effect, and ``coverage``, the share
      of tokens that any row takes.

    Padding is left out of all but ``moved``. Where there is nothing else (a batch of padding alone, or none at all),
    ``moved`` and ``balance_loss`` are all there is to say.

    Args:
        recorded: a pass, or one layer of it.

    Returns:
        Name to number; for a pass, names are ``"<layer>/<quantity>"``. A quantity that the layer, or this batch, does
        not have is left out: no mean is taken over nothing.
    """
    if isinstance(recorded, Pass):
        return {f"{layer.name}/{name}": value for layer in recorded for name, value in scalars(layer).items()}
    layer = recorded
    heard = layer.heard
    values: dict[str, Tensor] = {}
    some = bool(heard.any())
    if some:
        values |= {
            "slot_perplexity": layer.slot_perplexity,
            "dead_slots": torch.tensor(float(layer.dead_slots().numel())),
        }
    values["moved"] = layer.moved.mean()
    if some and layer.energy_before is not None and layer.energy_after is not None:
        values |= {"energy_before": layer.energy_before[heard].mean(), "energy_after": layer.energy_after[heard].mean()}
    if layer.balance_loss is not None:
        values["balance_loss"] = layer.balance_loss
    if some and layer.write is not None:
        values["row_perplexity"] = layer.write.row_perplexity.mean()
        values["coverage"] = (layer.write.load.amax(0) > 0)[heard].float().mean()
    return {name: float(value) for name, value in values.items()}


def table(recorded: Pass) -> str:
    """One line a layer, one column a quantity."""
    rows = {layer.name: scalars(layer) for layer in recorded}
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    cells = [["layer", *(column.replace("_", " ") for column in columns)]]
    for name, values in rows.items():
        cells.append([name, *(f"{values[column]:.4g}" if column in values else "" for column in columns)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
