"""Labelled images, of which a whole batch of bytes is taken at once: held in memory, or by another class's means."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from typing import Self


class LabelledImages(Dataset[tuple[Tensor, int]], ABC):
    """What training needs of a data set, wherever its images are: a map-style data set of ``(image, label)``.

    A subclass says how images are taken: ``image_shape``, ``__getitem__``, ``subset`` and ``_take``.

    Args:
        labels: ``(n,)`` of an integer dtype, each in ``[0, len(classes))``; kept as int64.
        classes: name of each class.
        name: what errors call this data set.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(self, labels: Tensor, classes: Sequence[str], name: str) -> None:
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise ValueError(f"{name}: expected labels of an integer dtype, got {labels.dtype}")
        labels = labels.to(torch.int64)
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= len(classes)):
            raise ValueError(
                f"{name}: expected labels in [0, {len(classes)}), got [{int(labels.min())}, {int(labels.max())}]"
            )
        self.labels = labels
        self.classes = tuple(classes)
        self.name = name

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """``(image (C, H, W) uint8, label)``."""

    @abstractmethod
    def _take(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each batch of indices ``(B,)`` int64 in turn, its images ``(B, C, H, W)`` uint8."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        return f"{self.name}: {len(self)} images of {channels} x {height} x {width}, {len(self.classes)} classes"

    def subset(self, indices: Tensor, name: str | None = None) -> Self:
        """The images at ``indices (m,)`` int64, independent of this data set."""
        part = copy.copy(self)
        part.labels = self.labels[indices]
        part.name = name or self.name
        return part

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[Self, Self]:
        """Splits off a share of every class, the same at every call: ``(the rest, the share)``, each in its old order.

        Args:
            fraction: size of the share, in (0, 1); ``round(fraction * n)`` images.
            seed: of the choice within each class.

        Raises:
            ValueError: ``fraction`` is outside (0, 1).
        """
        if not 0 < fraction < 1:
            raise ValueError(f"{self.name}: expected a fraction in (0, 1), got {fraction!r}")
        chosen = stratified_choice(self.labels, round(fraction * len(self)), seed)
        is_chosen = torch.zeros(len(self), dtype=torch.bool)
        is_chosen[chosen] = True
        return self.subset((~is_chosen).nonzero().squeeze(1)), self.subset(chosen)

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes once through the images: ``(images (B, C, H, W) uint8, labels (B,) int64)``.

        Args:
            batch_size: ``B``; the last batch may be smaller.
            generator: draws the order; without one, images come in their stored order.
            drop_last: leave out a last batch that is smaller.

        Raises:
            ValueError: ``batch_size < 1``.
        """
        check_batch_size(batch_size, self.name)
        return self._batches(batch_size, generator, drop_last)

    def _batches(
        self, batch_size: int, generator: torch.Generator | None, drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        batches = batch_indices(len(self), batch_size, generator, drop_last)
        for chosen, images in zip(batches, self._take(batches), strict=True):
            yield images, self.labels[chosen]


class ImageDataset(LabelledImages):
    """Images held in memory as bytes.

    Args:
        images: ``(n, C, H, W)`` uint8.
        labels: ``(n,)`` of an integer dtype, each in ``[0, len(classes))``; kept as int64.
        classes: name of each class.
        name: what errors call this data set.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str], name: str = "ImageDataset") -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"{name}: expected images (n, C, H, W) of dtype torch.uint8, got {tuple(images.shape)}, {images.dtype}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{name}: expected {len(images)} labels, one an image, got shape {tuple(labels.shape)}")
        super().__init__(labels, classes, name)
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Tensor, name: str | None = None) -> Self:
        """The images at ``indices (m,)`` int64, copied."""
        part = super().subset(indices, name)
        part.images = self.images[indices]
        return part

    def _take(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return (self.images[chosen] for chosen in batches)


def check_batch_size(batch_size: int, name: str) -> None:
    """A ValueError that begins with ``name`` where ``batch_size < 1``."""
    if batch_size < 1:
        raise ValueError(f"{name}: expected a batch size of at least 1, got {batch_size!r}")


def batch_indices(count: int, batch_size: int, generator: torch.Generator | None, drop_last: bool) -> list[Tensor]:
    """Indices of the items of each batch, ``(B,)`` int64; in stored order, or in one that ``generator`` draws."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    stop = count - count % batch_size if drop_last else count
    return [order[start : start + batch_size] for start in range(0, stop, batch_size)]


def stratified_choice(labels: Tensor, count: int, seed: int) -> Tensor:
    """Chooses ``count`` items so that every class has its share, to the nearest whole item.

    A class of ``n_c`` items out of ``n`` gets ``floor(count n_c / n)``; the classes with the largest remainders (of
    equal ones, the first) get one item more until ``count`` are chosen.

    Args:
        labels: ``(n,)`` integers.
        count: items to choose, at most ``n``.
        seed: of the choice within the classes.

    Returns:
        ``(count,)`` int64 indices, ascending.

    Raises:
        ValueError: ``count`` is not in ``[0, n]``.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"stratified_choice: expected a count in [0, {len(labels)}], got {count!r}")
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    classes, sizes = np.unique(labels.numpy(), return_counts=True)
    shares, remainders = np.divmod(count * sizes.astype(np.int64), len(labels))
    missing = count - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    # numpy promises that RandomState's streams never change; neither its newer generators nor torch's promise that,
    # and two runs shall be judged on the same images.
    random = np.random.RandomState(seed)
    chosen = [
        random.permutation(np.flatnonzero(labels.numpy() == label))[:share]
        for label, share in zip(classes, shares, strict=True)
    ]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))
