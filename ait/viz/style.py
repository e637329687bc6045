"""Colours and sizes that read in a paper and in a dark notebook, for every kind of colour vision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ait.nn._validate import check_choice, check_number

if TYPE_CHECKING:
    from matplotlib.colorizer import ColorizingArtist

Theme = Literal["light", "dark", "transparent"]

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without black, in an order in which neighbours differ in
# lightness, too.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")

# Ink, what recedes, and ground. The ink of "transparent" has a contrast of 4 to 1 both on white and on a dark page.
COLOURS: dict[str, tuple[str, str, str]] = {
    "light": ("#1a1a1a", "#b8b8b8", "#ffffff"),
    "dark": ("#e6e6e6", "#5c5c5c", "#121212"),
    "transparent": ("#7f7f7f", "#9a9a9a", "none"),
}


# Pixels of an inch: of a figure, whoever draws it (Jupyter's inline backend takes a figure's own); and on the page of a
# notebook, where 8 points are then about as large as the text around. Screens with more pixels than that have them.
DRAWN, SHOWN = 192, 120


class NotebookFigure(Figure):
    """A figure that a notebook shows, once, without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=DRAWN)
        width, height = (round(SHOWN * inches) for inches in self.get_size_inches())
        return content.getvalue(), {"width": width, "height": height}


@contextlib.contextmanager
def style(theme: Theme = "light") -> Iterator[None]:
    """Makes matplotlib figures created inside look like those of this package.

    Args:
        theme: ``"light"``, ``"dark"``, or ``"transparent"``.

    Raises:
        ValueError: another theme.
    """
    ink, faint, ground = COLOURS[check_choice("style", "theme", theme, tuple(COLOURS))]
    settings: dict[str, Any] = {
        "figure.facecolor": ground,
        "savefig.facecolor": "auto",
        "axes.facecolor": "none",
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=OKABE_ITO),
        "text.color": ink,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": faint,
        "grid.linewidth": 0.5,
        "grid.alpha": 0.5,
        "font.size": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        "image.cmap": "cividis",
        "pdf.fonttype": 42,
        "svg.hashsalt": "ait",
    }
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches; its colours are those of the :func:`style` around."""
    figure = NotebookFigure(figsize=(width, height), dpi=DRAWN, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_width(name: str, width: float) -> float:
    return check_number(name, "width", width, "[1.5, inf)")


def ink() -> Any:
    return matplotlib.rcParams["text.color"]


def faint() -> Any:
    return matplotlib.rcParams["grid.color"]


def on_colour(ground: str) -> str:
    """Black or white, whichever has more contrast on ``ground`` (relative luminance of WCAG 2)."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(ground)]
    luminance = sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def add_bar(figure: Figure, shown: ColorizingArtist, axes: Any, label: str = "") -> None:
    """A colour bar beside rows of images, about as long as two of them."""
    bar = figure.colorbar(shown, ax=axes, shrink=min(1.0, 1.4 / len(axes) + 0.2), pad=0.01, aspect=18)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.set_label(label)


def bare(axes: Axes) -> None:
    """Takes ticks and frame off, for images."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def short_name(layer: str) -> str:
    """The part of a layer's name that tells it from others."""
    for tail in (".workspace", ".mlp", ".global_workspace"):
        layer = layer.removesuffix(tail)
    return layer
