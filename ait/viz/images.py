"""Tokens on images: where each patch lies, and how an image is shown under them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ait.ops._checks import op_error
from ait.recording.layout import MOST_PREFIX_TOKENS
from ait.recording.rollout import choose_images
from ait.recording.trace import LayerRecord
from ait.viz.style import bare

GREY = (0.299, 0.587, 0.114)  # weights of luma, ITU-R BT.601


class Grid(NamedTuple):
    """Patches of an image, row by row, after ``prefix`` other tokens."""

    rows: int
    columns: int
    prefix: int

    def place(self, values: Tensor) -> np.ndarray:
        """``(N,)`` as ``(rows, columns)``, without the tokens that are no patches."""
        return values[self.prefix :].detach().cpu().reshape(self.rows, self.columns).numpy()


def choose_shown(name: str, layer: LayerRecord, image: Sequence[int] | int | None) -> list[int]:
    """Which images of the batch a figure shows; None is the first three."""
    return choose_images(name, range(min(3, layer.batch)) if image is None else image, layer.batch)


def find_grid(name: str, layer: LayerRecord, images: Tensor, grid: tuple[int, int] | None) -> Grid:
    """How the tokens of ``layer`` lie on ``images``.

    Args:
        name: of the function that asks, for errors.
        layer: a record.
        images: ``(B, C, H, W)``.
        grid: rows and columns; taken from the record, or from the sides of the images, if None.

    Raises:
        ValueError: images are not those of the record: another number of them, or sides that the patches do not fill.
    """
    check_images(name, images)
    batch, _, height, width = images.shape
    if not layer.batch:
        raise op_error(name, "a pass with at least one image", "an empty batch")
    if batch != layer.batch:
        expected = f"the {layer.batch} images of the recorded batch, (B, C, H, W)"
        raise op_error(name, expected, f"{batch} images, {tuple(images.shape)}")
    tokens = layer.tokens_per_image
    if grid is None and layer.grid is not None:
        grid = layer.grid
    if grid is not None:
        sides = tuple(grid) if isinstance(grid, Sequence) else (grid,)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise op_error(name, "grid=(rows, columns), two positive integers", repr(grid))
        rows, columns = sides
        prefix = tokens - rows * columns
        if prefix < 0:
            raise op_error(name, f"a grid of at most {tokens} patches, the tokens of an image", f"{rows} x {columns}")
        if height % rows or width % columns or height // rows != width // columns:
            expected = f"images that {rows} x {columns} square patches fill, such as {8 * rows} x {8 * columns} pixels"
            raise op_error(name, expected, f"{height} x {width}; or pass grid=(rows, columns)")
        return Grid(rows, columns, prefix)
    for prefix in range(min(MOST_PREFIX_TOKENS, tokens - 1) + 1):
        # rows / columns = height / width, rows * columns = tokens - prefix
        rows = round(((tokens - prefix) * height / width) ** 0.5)
        columns = (tokens - prefix) // max(rows, 1)
        if rows and rows * columns == tokens - prefix and rows * width == columns * height and height % rows == 0:
            return Grid(rows, columns, prefix)
    raise op_error(
        name,
        f"images whose patches make up the {tokens} tokens of layer {layer.name!r}",
        f"{height} x {width} pixels; pass grid=(rows, columns) if their patches are not square",
    )


def check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise op_error(name, "images to be a tensor (B, C, H, W)", type(images).__name__)
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape)
        last = images.dim() == 4 and images.shape[-1] in (1, 3)
        raise op_error(name, "images of shape (B, 1 or 3, H, W)", f"{shape}; permute(0, 3, 1, 2)" if last else shape)


def to_pixels(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """``(C, H, W)`` as ``(H, W, 3)`` in [0, 1].

    Bytes and numbers in [0, 1] are shown as they are; ``image * std + mean`` where these are given; anything else is
    stretched between its least and its largest value.
    """
    pixels = image.detach().cpu().float()
    if image.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None or std is not None:
        pixels = pixels * _by_channel("std", std, 1.0, image.shape[0]) + _by_channel("mean", mean, 0.0, image.shape[0])
    elif float(pixels.min()) < 0 or float(pixels.max()) > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12)
    return pixels.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _by_channel(name: str, values: Sequence[float] | None, default: float, channels: int) -> Tensor:
    """``(C, 1, 1)``."""
    given = [default] * channels if values is None else list(values) if isinstance(values, Iterable) else [values]
    if len(given) not in (1, channels):
        raise op_error("ait.viz", f"{name} with a number for each of the {channels} channels", f"{len(given)} numbers")
    return torch.tensor([float(value) for value in given]).view(-1, 1, 1)


def show_image(axes: Axes, pixels: np.ndarray) -> None:
    """Shows ``(H, W, 3)`` without axes."""
    axes.imshow(pixels, interpolation="nearest" if min(pixels.shape[:2]) < 128 else "antialiased")
    bare(axes)


def show_faded(axes: Axes, pixels: np.ndarray) -> None:
    """Shows an image as pale grey, as the ground under colours."""
    grey = pixels @ np.array(GREY)
    show_image(axes, np.repeat((0.35 + 0.5 * grey)[..., None], 3, axis=2))


def extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Where :meth:`Axes.imshow` puts an image, so that a coarser one covers it."""
    height, width = pixels.shape[:2]
    return -0.5, width - 0.5, height - 0.5, -0.5
