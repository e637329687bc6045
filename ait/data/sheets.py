"""Contact sheets: a small-image data set as a few lossless WebP pictures, labels and a checksum.

A folder holds ``train-00.webp``, ``train-01.webp``, ..., ``test-00.webp``, ..., each a grid of images in row-major
order (the last of a split filled up with black), ``train-labels.npy`` and ``test-labels.npy`` ``(n,)``, and
``meta.json``::

    {"train": {"images": 50000, "sheets": 20, "sha256": "..."}, "test": {...}, "classes": ["airplane", ...],
     "sheet": "50 x 50 images of 32 x 32 RGB, row-major; order is a fixed shuffle"}

The SHA-256 is that of the split's raw uint8 ``(n, height, width, channels)`` array, which is what :func:`write_sheets`
records, or that of this array followed by the labels as stored, which some sets record and which covers them, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ait.data._optional import require
from ait.data.dataset import ImageDataset

SPLITS = ("train", "test")
CHANNELS = {"RGB": 3, "grey": 1}
MAX_SHEET_SIDE = 16383  # of a WebP picture, in pixels


class SheetFormat(NamedTuple):
    """Grid of a sheet and size of its images: rows and columns of images; height, width and colours of one."""

    rows: int
    columns: int
    height: int
    width: int
    colours: str

    @property
    def channels(self) -> int:
        return CHANNELS[self.colours]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a sheet in pixels."""
        return self.columns * self.width, self.rows * self.height

    def sheets_for(self, images: int) -> int:
        return -(-images // (self.rows * self.columns))

    def __str__(self) -> str:
        return (
            f"{self.rows} x {self.columns} images of {self.height} x {self.width} {self.colours}, "
            "row-major; order is a fixed shuffle"
        )

    @classmethod
    def parse(cls, text: str) -> SheetFormat | None:
        """The format that :meth:`__str__` describes; None where ``text`` is something else."""
        number = r"([1-9]\d{0,4})"
        colours = "|".join(CHANNELS)
        pattern = f"{number} x {number} images of {number} x {number} ({colours}), row-major; order is a fixed shuffle"
        match = re.fullmatch(pattern, text)
        if match is None:
            return None
        rows, columns, height, width = map(int, match.groups()[:4])
        return cls(rows, columns, height, width, match.group(5))


def read_sheets(folder: str | Path, name: str = "sheets") -> tuple[ImageDataset, ImageDataset]:
    """Reads a folder of contact sheets, and verifies the checksum of each split.

    Args:
        folder: where the sheets, the labels and ``meta.json`` are.
        name: what errors and the data sets' names begin with.

    Returns:
        Training and test images, in stored order.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, altered, or does not fit the others.
        ImportError: Pillow is not installed.
    """
    folder = Path(folder)
    meta = _read_meta(folder / "meta.json", name)
    train, test = (_read_split(folder, split, meta, name) for split in SPLITS)
    return train, test


def write_sheets(
    folder: str | Path,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: Sequence[str],
    *,
    grid: tuple[int, int] = (50, 50),
    seed: int = 0,
) -> None:
    """Packs a small-image data set into contact sheets, in an order shuffled by ``seed``.

    Args:
        folder: a new or empty folder.
        train: images ``(n, C, H, W)`` uint8 with C = 1 or 3, and labels ``(n,)``.
        test: the same for the test set, of the same ``C``, ``H`` and ``W``.
        classes: name of each class.
        grid: rows and columns of images on a sheet.
        seed: of the order, which is the same for the same seed everywhere.

    Raises:
        ValueError: images, labels or grid are not as above.
        FileExistsError: the folder has files in it.
        ImportError: Pillow is not installed.
    """
    folder = Path(folder)
    pil_image = require("PIL.Image", "contact sheets")
    sets = {
        split: ImageDataset(*pair, classes, f"{split} images")
        for split, pair in zip(SPLITS, (train, test), strict=True)
    }
    channels, height, width = sets["train"].image_shape
    colours = {count: colours for colours, count in CHANNELS.items()}.get(channels)
    if colours is None or sets["test"].image_shape != sets["train"].image_shape:
        shapes = " and ".join(str(data.image_shape) for data in sets.values())
        raise ValueError(f"write_sheets: expected train and test images of one shape, C = 1 or 3, got {shapes}")
    form = SheetFormat(*grid, height, width, colours)
    if min(form[:4]) < 1 or max(form.picture_size) > MAX_SHEET_SIDE:
        raise ValueError(
            f"write_sheets: expected sheets of 1 to {MAX_SHEET_SIDE} pixels a side, got {form.picture_size} "
            f"from a grid of {grid} images of {height} x {width}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"write_sheets: expected a new or empty folder, got {folder}, which has files in it")

    meta: dict[str, Any] = {}
    random = np.random.RandomState(seed)  # its streams never change, so neither does the order
    for split, data in sets.items():
        order = torch.from_numpy(random.permutation(len(data)))
        array = np.ascontiguousarray(data.images[order].permute(0, 2, 3, 1).numpy())
        labels = data.labels[order].numpy()
        pictures = _pictures(array, form)
        for index, picture in enumerate(pictures):
            pixels = pil_image.fromarray(picture if channels == 3 else np.repeat(picture, 3, axis=2))
            pixels.save(folder / f"{split}-{index:02d}.webp", lossless=True)
        np.save(folder / f"{split}-labels.npy", labels.astype(np.uint8) if len(classes) <= 256 else labels)
        checksum = hashlib.sha256(array.tobytes()).hexdigest()
        meta[split] = {"images": len(data), "sheets": len(pictures), "sha256": checksum}
    meta |= {"classes": list(classes), "sheet": str(form)}
    # Written last: without it a folder that was left half-way is no data set.
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _pictures(array: np.ndarray, form: SheetFormat) -> list[np.ndarray]:
    """``(n, height, width, channels)`` as pictures, the last filled up with black."""
    count = form.sheets_for(len(array))
    room = count * form.rows * form.columns
    filled = np.concatenate([array, np.zeros((room - len(array), *array.shape[1:]), np.uint8)])
    grid = filled.reshape(count, form.rows, form.columns, form.height, form.width, form.channels)
    width, height = form.picture_size
    return list(grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, height, width, form.channels))


def _images(picture: np.ndarray, form: SheetFormat) -> np.ndarray:
    """A picture as ``(rows * columns, height, width, channels)``."""
    grid = picture.reshape(form.rows, form.height, form.columns, form.width, form.channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, form.height, form.width, form.channels)


class _Meta(NamedTuple):
    splits: dict[str, dict[str, Any]]
    classes: list[str]
    form: SheetFormat


def _read_meta(path: Path, name: str) -> _Meta:
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no {path}; a folder of contact sheets holds one")

    def problem(expected: str, got: object) -> ValueError:
        return ValueError(f"{name}: {path}: expected {expected}, got {got!r}")

    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {path}: expected JSON, got something that does not parse: {error}") from error
    if not isinstance(meta, dict) or not {*SPLITS, "classes", "sheet"} <= meta.keys():
        got = sorted(meta) if isinstance(meta, dict) else meta
        raise problem("an object with 'train', 'test', 'classes' and 'sheet'", got)
    form = SheetFormat.parse(meta["sheet"]) if isinstance(meta["sheet"], str) else None
    if form is None:
        raise problem(f"'sheet' like {str(SheetFormat(50, 50, 32, 32, 'RGB'))!r}", meta["sheet"])
    classes = meta["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(each, str) for each in classes):
        raise problem("'classes' to be a list of names", classes)
    for split in SPLITS:
        entry = meta[split]
        images, sheets = map(entry.get, ("images", "sheets")) if isinstance(entry, dict) else (None, None)
        if type(images) is not int or images < 0 or type(sheets) is not int:
            raise problem(f"{split!r} with the numbers 'images' and 'sheets'", entry)
        if sheets != form.sheets_for(images):
            raise problem(f"{split!r} with {form.sheets_for(images)} sheets for {images} images", sheets)
        if not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))):
            raise problem(f"{split!r} with a 'sha256' of 64 hexadecimal digits", entry.get("sha256"))
    return _Meta({split: meta[split] for split in SPLITS}, classes, form)


def _read_split(folder: Path, split: str, meta: _Meta, name: str) -> ImageDataset:
    entry, form = meta.splits[split], meta.form
    count = entry["images"]
    sheet_paths = [folder / f"{split}-{index:02d}.webp" for index in range(entry["sheets"])]
    labels_path = folder / f"{split}-labels.npy"
    for path in (labels_path, *sheet_paths):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no {path}; meta.json lists {len(sheet_paths)} sheets of '{split}'")
    labels = _read_labels(labels_path, count, len(meta.classes), name)
    parts = [_images(_read_picture(path, form, name), form) for path in sheet_paths]
    empty = np.empty((0, form.height, form.width, form.channels), np.uint8)
    array = np.concatenate([empty, *parts])[:count]
    of_images = hashlib.sha256(array.tobytes())
    of_both = of_images.copy()
    of_both.update(labels.tobytes())
    if entry["sha256"] not in (of_images.hexdigest(), of_both.hexdigest()):
        raise ValueError(
            f"{name}: {folder / split}-*.webp: expected SHA-256 {entry['sha256']} (meta.json), got "
            f"{of_images.hexdigest()} of the images and {of_both.hexdigest()} of images and labels: a file was altered"
        )
    images = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    return ImageDataset(images, torch.from_numpy(labels.astype(np.int64)), meta.classes, f"{name} {split}")


def _read_picture(path: Path, form: SheetFormat, name: str) -> np.ndarray:
    """A sheet as ``(height, width, channels)`` uint8."""
    pil_image = require("PIL.Image", "contact sheets")
    try:
        with pil_image.open(path, formats=["WEBP"]) as picture:
            if picture.size != form.picture_size or picture.mode != "RGB":
                raise ValueError(
                    f"{name}: {path}: expected a sheet of {' x '.join(map(str, form.picture_size))} pixels, RGB, "
                    f"got {' x '.join(map(str, picture.size))}, {picture.mode}"
                )
            return np.asarray(picture)[:, :, : form.channels]
    except (OSError, SyntaxError, EOFError, RuntimeError) as error:
        size = path.stat().st_size
        raise ValueError(f"{name}: {path}: expected a whole WebP picture, got {size} bytes: {error}") from error


def _read_labels(path: Path, count: int, num_classes: int, name: str) -> np.ndarray:
    try:
        labels = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name}: {path}: expected a whole .npy file of numbers, got {error}") from error
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "ui" or labels.shape != (count,):
        got = f"{labels.shape} of {labels.dtype}" if isinstance(labels, np.ndarray) else "several arrays"
        raise ValueError(f"{name}: {path}: expected {count} integer labels, got {got}")
    if count and (labels.min() < 0 or labels.max() >= num_classes):
        got = f"[{labels.min()}, {labels.max()}]"
        raise ValueError(f"{name}: {path}: expected labels in [0, {num_classes}), got {got}")
    return labels
