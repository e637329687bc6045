"""Figures of recordings. Needs matplotlib, the extra ``[viz]``.

Every function returns a :class:`matplotlib.figure.Figure` that pyplot does not know: a notebook shows it as the value
of a cell, ``figure.savefig(path)`` writes it, and nothing has to be closed. ``theme`` is ``"light"``, ``"dark"`` or
``"transparent"`` (for pages that are light or dark as the reader likes), ``width`` in inches.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'ait.viz: cannot import matplotlib ({error}); pip install "associative-transformer[viz]"', name="matplotlib"
    ) from error

from ait.recording.rollout import Rollout, attention_rollout
from ait.viz.energy import plot_energy
from ait.viz.memory import plot_memory
from ait.viz.retrieval import plot_retrieval
from ait.viz.rollout import plot_rollout
from ait.viz.slots import plot_slots
from ait.viz.style import OKABE_ITO, style
from ait.viz.use import plot_slot_use

__all__ = [
    "OKABE_ITO",
    "Rollout",
    "attention_rollout",
    "plot_energy",
    "plot_memory",
    "plot_retrieval",
    "plot_rollout",
    "plot_slot_use",
    "plot_slots",
    "style",
]
