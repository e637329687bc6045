"""The Triangle task: do three clusters of points stand in an equilateral triangle?"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ait.data._random import image_count, seeded
from ait.data.dataset import ImageDataset

if TYPE_CHECKING:
    from typing import Self

TRIANGLE_TRAIN_IMAGES = 50_000
TRIANGLE_TEST_IMAGES = 10_000
TRIANGLE_CLASSES = ("equilateral", "random")

_SIZE = 64  # pixels a side; points may lie on its rim, at 0 and at 64, where their circles are cut off
_INK = 255
_RADIUS = 2  # of a point's circle
_REACH = _RADIUS + 1  # of a cluster, whose points are up to 1 away from its centre
_CHUNK = 4096  # images drawn at once: the canvas stays within 20 MB


def triangle(num_images: int, seed: int) -> ImageDataset:
    """Generates images of three clusters of points, equilateral (label 0) or at random (label 1), each label with 1/2.

    A cluster at the centre ``c`` is four pairs of points: the first of a pair uniform over the integers of
    ``[c - 1, c + 1]^2``, the second its mirror image ``2c - p``. A point is a filled circle of radius 2, its pixels
    those with ``dx^2 + dy^2 <= 4``, as OpenCV's ``circle`` draws it. Centres are uniform integers in ``[1, 63]^2``; for
    label 0 the third is the first plus the displacement to the second, turned by 60 degrees and truncated to integers,
    and all three are drawn again until the third is in ``[1, 63]^2``, too.

    Args:
        num_images: ``n``; the protocol has ``TRIANGLE_TRAIN_IMAGES`` and, under another seed,
            ``TRIANGLE_TEST_IMAGES``.
        seed: in ``[0, 2^63)``; the same images for the same number and seed, on every machine.

    Returns:
        Images ``(n, 3, 64, 64)`` uint8, 0 = ground, 255 = ink, with two classes. The three channels are one stored
        channel seen three times (stride 0), 4 KiB an image: batches are ordinary tensors, but writing in place into
        ``images`` needs a ``clone()``.

    Raises:
        ValueError: ``num_images`` or ``seed`` is not as above.

    Source: the task of Goyal et al., Coordination Among Neural Modules Through a Shared Global Workspace, 2022, as the
    published code of the Associative Transformer (Sun et al.) draws it.
    """
    count = image_count(num_images, "triangle")
    random = seeded(seed, "triangle")
    labels = random.randint(0, 2, count, np.int64)
    centres = _draw_centres(labels, random)
    cluster_kinds = _draw_cluster_kinds(count, random)
    images = np.empty((count, 1, _SIZE, _SIZE), np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        images[chunk, 0] = _paint(centres[chunk], cluster_kinds[chunk])
    return _GreyAsColour(torch.from_numpy(images), torch.from_numpy(labels), TRIANGLE_CLASSES, "triangle")


class _GreyAsColour(ImageDataset):
    """Stores one channel and shows it three times; so do its subsets."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str], name: str) -> None:
        super().__init__(images.expand(-1, 3, -1, -1), labels, classes, name)

    def subset(self, indices: Tensor, name: str | None = None) -> Self:
        part = copy.copy(self)
        part.images = self.images[:, :1][indices].expand(-1, 3, -1, -1)
        part.labels = self.labels[indices]
        part.name = name or self.name
        return part


def third_corner(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Last corner of an equilateral triangle: ``first`` plus the displacement to ``second``, turned by 60 degrees.

    Args:
        first: ``(m, 2)`` integers, x and y.
        second: ``(m, 2)``.

    Returns:
        ``(m, 2)`` int64, truncated towards zero.
    """
    # An exact 1/2: cos(pi / 3) in doubles is a trifle more and would truncate some whole numbers to the next lower one.
    cos, sin = 0.5, math.sqrt(3) / 2
    dx, dy = (second - first).T
    x = first[:, 0] + (cos * dx + sin * dy)
    y = first[:, 1] + (-sin * dx + cos * dy)
    return np.trunc(np.stack([x, y], axis=1)).astype(np.int64)


def _draw_centres(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """``(n, 3, 2)``: x and y of each cluster."""
    centres = random.randint(1, _SIZE, (len(labels), 3, 2), np.int64)
    pending = np.flatnonzero(labels == 0)
    drawn = centres[pending]
    while len(pending):
        drawn[:, 2] = third_corner(drawn[:, 0], drawn[:, 1])
        centres[pending] = drawn
        # The whole square of the third cluster's points has to lie in [0, 64]^2.
        leaves = ((drawn[:, 2] - 1 < 0) | (drawn[:, 2] + 1 > _SIZE)).any(axis=1)
        pending = pending[leaves]
        drawn = random.randint(1, _SIZE, (len(pending), 3, 2), np.int64)
    return centres


def _draw_cluster_kinds(count: int, random: np.random.RandomState) -> np.ndarray:
    """``(n, 3)``: which of a cluster's nine places hold a point, one bit a place."""
    # Of the first point of each pair, the square's places counted row by row; the mirror image of place p is 8 - p.
    places = random.randint(0, 9, (count, 3, 4), np.int64)
    return np.bitwise_or.reduce((1 << places) | (1 << (8 - places)), axis=2)


def _paint(centres: np.ndarray, cluster_kinds: np.ndarray) -> np.ndarray:
    """``(n, 64, 64)`` uint8 from centres ``(n, 3, 2)`` and ``(n, 3)``."""
    stamps = _stamps(cluster_kinds)  # (n, 3, 7, 7)
    side = stamps.shape[2]
    # Stamps reach over the rim by up to two pixels on the left and three on the right.
    canvas = np.zeros((len(centres), _SIZE + 2 * _REACH, _SIZE + 2 * _REACH), np.uint8)
    each = np.arange(len(centres))
    for cluster in range(3):
        columns, rows = centres[:, cluster].T
        for row in range(side):
            for column in range(side):
                canvas[each, rows + row, columns + column] |= stamps[:, cluster, row, column]
    return canvas[:, _REACH:-_REACH, _REACH:-_REACH]


def _stamps(cluster_kinds: np.ndarray) -> np.ndarray:
    """The clusters ``(..., 7, 7)`` of those kinds ``(...)``, the centre in the middle."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    disc = np.where(offsets**2 + offsets[:, None] ** 2 <= _RADIUS**2, _INK, 0).astype(np.uint8)
    kinds, which = np.unique(cluster_kinds, return_inverse=True)
    drawn = np.zeros((len(kinds), 2 * _REACH + 1, 2 * _REACH + 1), np.uint8)
    for stamp, kind in zip(drawn, kinds, strict=True):
        for place in range(9):
            if kind >> place & 1:
                row, column = divmod(place, 3)
                stamp[row : row + len(disc), column : column + len(disc)] |= disc
    return drawn[which.reshape(cluster_kinds.shape)]
