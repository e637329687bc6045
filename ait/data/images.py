"""Handwritten digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ait.data._optional import require
from ait.data.dataset import ImageDataset, stratified_choice
from ait.data.sheets import read_sheets

DIGITS_TEST_IMAGES = 360
DIGITS_SEED = 0  # of the choice of those: part of the protocol


def digits() -> tuple[ImageDataset, ImageDataset]:
    """The 1,797 handwritten digits that ship with scikit-learn, 8 x 8, one channel, 0 = paper, 255 = ink.

    Returns:
        1,437 training and 360 test images; the test set is fixed and stratified by class.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    bunch = require("sklearn.datasets", "the digits").load_digits()
    # Stored as 17 grey levels, 0 to 16.
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    in_test[stratified_choice(labels, DIGITS_TEST_IMAGES, DIGITS_SEED)] = True
    classes = [str(digit) for digit in range(10)]
    return (
        ImageDataset(images[~in_test], labels[~in_test], classes, "digits train"),
        ImageDataset(images[in_test], labels[in_test], classes, "digits test"),
    )


def cifar10(data_dir: str | Path, download: bool = False) -> tuple[ImageDataset, ImageDataset]:
    """CIFAR-10: 50,000 training and 10,000 test images, 3 x 32 x 32, 10 classes.

    Args:
        data_dir: a folder of contact sheets (see :mod:`ait.data.sheets`), or one that holds torchvision's
            ``cifar-10-batches-py``. Checksums are verified either way.
        download: let torchvision download the set into ``data_dir`` if it is not there.

    Raises:
        FileNotFoundError: neither is there, or a sheet is missing.
        ValueError: files are truncated or altered, or hold another data set.
        ImportError: torchvision (for its folder) or Pillow (for sheets) is not installed.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    return _cifar("cifar10", data_dir, download)


def cifar100(data_dir: str | Path, download: bool = False) -> tuple[ImageDataset, ImageDataset]:
    """CIFAR-100: as :func:`cifar10`, with 100 classes and torchvision's folder ``cifar-100-python``."""
    return _cifar("cifar100", data_dir, download)


@dataclass(frozen=True)
class _KnownSet:
    num_classes: int
    folder: str  # torchvision's, and its class
    torchvision_class: str


_SETS = {
    "cifar10": _KnownSet(10, "cifar-10-batches-py", "CIFAR10"),
    "cifar100": _KnownSet(100, "cifar-100-python", "CIFAR100"),
}


def _cifar(name: str, data_dir: str | Path, download: bool) -> tuple[ImageDataset, ImageDataset]:
    known, data_dir = _SETS[name], Path(data_dir)
    if (data_dir / "meta.json").exists():
        train, test = read_sheets(data_dir, name)
    elif (data_dir / known.folder).is_dir() or download:
        train, test = _from_torchvision(name, data_dir, download)
    else:
        state = "a folder without either" if data_dir.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{name}: expected {data_dir} to hold {known.folder!r} or contact sheets with a 'meta.json', "
            f"got {state}. {how_to_get(name)}"
        )
    if len(train.classes) != known.num_classes or train.image_shape != (3, 32, 32):
        raise ValueError(
            f"{name}: {data_dir}: expected images of 3 x 32 x 32 in {known.num_classes} classes, got {train!r}"
        )
    return train, test


def _from_torchvision(name: str, data_dir: Path, download: bool) -> tuple[ImageDataset, ImageDataset]:
    known = _SETS[name]
    make: Callable = getattr(require("torchvision.datasets", name), known.torchvision_class)
    splits = []
    for split in ("train", "test"):
        try:
            data = make(data_dir, train=split == "train", download=download)
        except RuntimeError as error:
            expected = f"{name}: {data_dir / known.folder}: expected files with the checksums of the original"
            raise ValueError(f"{expected}, got: {error} {how_to_get(name)}") from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        splits.append(ImageDataset(images, torch.tensor(data.targets), data.classes, f"{name} {split}"))
    return splits[0], splits[1]


def how_to_get(name: str) -> str:
    """One sentence on where a data set's files come from."""
    if name == "image_folder":
        return "A folder with train/CLASS/*.jpg and val/CLASS/*.jpg will do."
    if name == "imagenet100":
        return "To get it: copy the folders of 100 classes of ImageNet-1K (image-net.org) into train/ and val/."
    size = math.ceil({"cifar10": 170.5, "cifar100": 169.0, "oxford_pet": 811}[name])
    sheets = " A folder made by ait.data.write_sheets will do as well." if name in _SETS else ""
    call = f"ait.data.load_images({name!r}, 'data', download=True)"
    return f"To get it ({size} MB): {call}, or train.py with --data-dir data --download.{sheets}"
