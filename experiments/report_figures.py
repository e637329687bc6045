"""Figures of a report as HTML without scripts: curves, confusion matrices, heat maps and PNG pictures.

Lines and text take their colours from ``report_style.css``, which follows the reader's light or dark theme. Heat maps
are PNGs whose opacity is the value, so that zero is the page itself in either theme.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLUE, VERMILION = (0, 114, 178), (213, 94, 0)  # of Okabe and Ito, told apart by colour-blind readers, too
LARGEST_TABLE = 20  # classes of a confusion matrix whose counts are written into the cells
MOST_MARKERS = 60  # points of a curve that are drawn one by one

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34


class Series(NamedTuple):
    """A curve; points that are not finite are left out."""

    name: str
    style: str  # class in report_style.css: "train", "validation" or "single"
    points: Sequence[tuple[int, float]]


def escape(value: object) -> str:
    """Text as HTML, also fit for an attribute in double quotes."""
    return html.escape(str(value))


def number(value: float) -> str:
    """A number of a table or an axis: four significant digits, large ones with separators."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share, as in ``12.34 %``."""
    return f"{100 * share:.2f} %"


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, whose first and last enclose ``[low, high]``.

    Args:
        low: least value.
        high: greatest value, at least ``low``.
        most: of intervals between them, about.
    """
    if high <= low:
        spread = max(abs(low), abs(high)) * 0.1 or 1.0
        low, high = low - spread, high + spread
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(
    title: str, series: Sequence[Series], marked: int | None = None, from_zero: bool = False, shares: bool = False
) -> str:
    """Values against the epoch, as a figure with a legend; nothing where there are no finite values.

    Args:
        title: plain text.
        series: curves.
        marked: epoch at which a vertical line stands.
        from_zero: begin the axis at zero, whatever the least value is.
        shares: write the axis in per cent.
    """
    finite = [(each, [point for point in each.points if math.isfinite(point[1])]) for each in series]
    finite = [(each, points) for each, points in finite if points]
    if not finite:
        return ""
    values = [value for _, points in finite for _, value in points]
    epochs = [epoch for _, points in finite for epoch, _ in points]
    ticks = nice_ticks(min(0.0, *values) if from_zero else min(values), max(values))
    first, last = min(epochs), max(epochs)

    def x(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        label = f"{100 * tick:.4g} %" if shares else number(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _epoch_ticks(first, last):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">epoch</text>')
    if marked is not None and first <= marked <= last:
        parts.append(
            f'<line class="marked" x1="{x(marked):.1f}" x2="{x(marked):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>weights kept: epoch {marked}</title></line>"
        )
    for each, points in finite:
        path = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in points)
        parts.append(f'<polyline class="{each.style}" points="{path}"/>')
        if len(points) <= MOST_MARKERS:
            for epoch, value in points:
                shown = percent(value) if shares else number(value)
                parts.append(
                    f'<circle class="{each.style}" cx="{x(epoch):.1f}" cy="{y(value):.1f}" r="2.6">'
                    f"<title>epoch {epoch}, {escape(each.name)}: {shown}</title></circle>"
                )
    legend = ""
    if len(finite) > 1:
        key = '<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><polyline class="{}" points="1,5 25,5"/></svg>'
        legend = "".join(
            f'<span class="legend">{key.format(each.style)}{escape(each.name)}</span>' for each, _ in finite
        )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by epoch">{"".join(parts)}</svg>'
        "</figure>"
    )


def confusion_figure(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """Rows are true classes, columns answers: counts in cells, or an image where there are more than 20 classes.

    Args:
        confusion: counts ``(n, n)``.
        classes: ``n`` names.
    """
    if len(classes) <= LARGEST_TABLE:
        return _confusion_table(confusion, classes)
    shares = _shares_of_rows(confusion) ** 0.5
    pixels = np.zeros((*shares.shape, 4), np.uint8)
    pixels[..., :3] = VERMILION
    pixels[..., 3] = np.rint(255 * shares)
    diagonal = np.arange(len(shares))
    pixels[diagonal, diagonal, :3] = BLUE
    name = f"confusion matrix of {len(classes)} classes"
    return (
        '<figure class="confusion-image"><div class="axis">answered class, '
        f"0 to {len(classes) - 1} &rarr;</div>"
        f'<div class="axis down">true class, 0 to {len(classes) - 1} &darr;</div>'
        f'<img class="pixels" alt="{name}" src="{data_uri(pixels)}"></figure>'
    )


def _confusion_table(confusion: np.ndarray, classes: Sequence[str]) -> str:
    shares, names = _shares_of_rows(confusion), [shortened(name) for name in classes]
    cell = 38
    left = top = 14 + round(6.6 * max(len(name) for name in names))
    top = max(30, round(0.75 * top) + 8)
    side = cell * len(names)
    slope = round(0.7 * top)  # of the last slanted name, beyond the last column
    parts = []
    for index, name in enumerate(names):
        middle = cell * (index + 0.5)
        at = f"{left + middle - 3:.0f},{top - 7}"
        parts.append(f'<text transform="translate({at}) rotate(-45)">{escape(name)}</text>')
        parts.append(f'<text x="{left - 7}" y="{top + middle + 4:.0f}" text-anchor="end">{escape(name)}</text>')
    for (row, column), count in np.ndenumerate(confusion):
        x, y, share = left + cell * column, top + cell * row, shares[row, column]
        # Less than linear, so that a few mistakes show beside the diagonal.
        opacity = f"{share**0.5:.3f}"
        hue = "right" if row == column else "wrong"
        said = f"{classes[row]} answered as {classes[column]}: {count:,} of {confusion[row].sum():,}"
        shown = "" if not count else f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
        on = ' class="on"' if share**0.5 > 0.6 else ""
        parts.append(
            f'<g><title>{escape(said)}</title><rect class="cell" x="{x}" y="{y}" width="{cell}" height="{cell}"/>'
            f'<rect class="{hue}" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" '
            f'fill-opacity="{opacity}"/>'
            f'<text{on} x="{x + cell // 2}" y="{y + cell // 2 + 4}" text-anchor="middle">{shown}</text></g>'
        )
    width, height = left + side + slope, top + side + 2
    least = max(330, round(0.8 * width))
    return (
        f'<div class="scroll" style="max-width:{width}px;flex-basis:min({width}px,26rem)">'
        f'<svg class="confusion" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="confusion matrix" style="min-width:{min(least, width)}px">'
        f"{''.join(parts)}</svg></div>"
    )


def signed_heat_map(values: np.ndarray, largest: float, name: str) -> str:
    """An image of a matrix: blue below zero, vermilion above, opacity by size.

    Args:
        values: finite, ``(rows, columns)``.
        largest: size that is drawn opaque.
        name: of the picture, for those who do not see it.
    """
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where(values[..., None] < 0, np.array(BLUE, np.uint8), np.array(VERMILION, np.uint8))
    # 52 levels are more than an eye tells apart, and make a smaller file than 256.
    pixels[..., 3] = 5 * np.rint(51 * np.clip(np.abs(values) / max(largest, 1e-30), 0, 1)).astype(np.uint8)
    return f'<img class="pixels heat" alt="{escape(name)}" src="{data_uri(pixels)}">'


def picture(image: np.ndarray, name: str) -> str:
    """An image ``(C, H, W)`` of bytes with one or three channels."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    return f'<img class="pixels" alt="{escape(name)}" src="{data_uri(pixels)}">'


def interval_bar(share: float, low: float, high: float, marks: Sequence[tuple[str, float]] = ()) -> str:
    """A share from 0 to 1 as a bar with its interval; ``marks`` are named shares to compare with."""
    parts = [
        '<rect class="cell" x="0" y="4" width="200" height="10"/>',
        f'<rect class="right" x="0" y="4" width="{200 * share:.1f}" height="10"/>',
        f'<line class="whisker" x1="{200 * low:.1f}" x2="{200 * high:.1f}" y1="9" y2="9"/>',
    ]
    for name, at in marks:
        parts.append(
            f'<line class="marked" x1="{200 * at:.1f}" x2="{200 * at:.1f}" y1="0" y2="18">'
            f"<title>{escape(name)}: {percent(at)}</title></line>"
        )
    return f'<svg class="bar" viewBox="-1 0 202 18" aria-hidden="true">{"".join(parts)}</svg>'


def data_uri(pixels: np.ndarray) -> str:
    """A PNG of bytes ``(H, W, channels)`` with 1 (grey), 3 (RGB) or 4 (RGBA) channels, in place of an address."""
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of a row says: not filtered
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def shortened(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _shares_of_rows(confusion: np.ndarray) -> np.ndarray:
    return confusion / np.maximum(confusion.sum(1, keepdims=True), 1)


def _epoch_ticks(first: int, last: int) -> list[int]:
    step = max(1, round(nice_ticks(0, max(last - first, 1), 8)[1]))
    ticks = [tick for tick in range(first, last + 1) if tick % step == 0]
    return ticks if len(ticks) > 1 or first == last else [first, last]
