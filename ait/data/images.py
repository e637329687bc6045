"""The image data sets by name: handwritten digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ait.data._optional import require
from ait.data.augment import normalize, random_crop, random_horizontal_flip
from ait.data.dataset import ImageDataset, stratified_choice
from ait.data.sheets import read_sheets

DIGITS_TEST_IMAGES = 360
SPLIT_SEED = 0  # of the digits' test set and of every validation split: part of the protocol, not a run's choice
VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class ImageSplits:
    """A data set split for an experiment, and how its images become a model's input.

    Attributes:
        train: what a model learns from.
        validation: a fixed tenth of the training images, stratified by class: for every choice that is made.
        test: read once a run.
        mean: of each channel of images in [0, 1].
        std: the same for the standard deviation.
        crop_padding: padding of the random crop in pixels; 0 = no crop.
        flip: whether the mirror image of a class is one of the class, too.
        crop_probability: with which an image is cropped.
    """

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    crop_probability: float = 1.0

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random crop and flip of a batch ``(B, C, H, W)``, as far as this data set bears them."""
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, generator, self.crop_probability)
        return random_horizontal_flip(images, generator) if self.flip else images

    def normalize(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` uint8 to float32 with about zero mean and unit deviation a channel."""
        return normalize(images, self.mean, self.std)


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
    in_test[stratified_choice(labels, DIGITS_TEST_IMAGES, SPLIT_SEED)] = True
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


def list_images() -> list[str]:
    """Names that :func:`load_images` knows."""
    return sorted(_SETS)


def load_images(name: str, data_dir: str | Path | None = None, download: bool = False) -> ImageSplits:
    """Loads a data set by name, with its fixed validation split, normalisation and augmentation.

    Args:
        name: one of :func:`list_images`.
        data_dir: where its files are; not needed for the digits.
        download: let torchvision download what is missing.

    Raises:
        ValueError: no data set has this name, or its files are altered.
        FileNotFoundError: its files are missing.
        ImportError: a package that it needs is not installed.
    """
    if name not in _SETS:
        raise ValueError(f"load_images: no data set named {name!r}; there are {', '.join(map(repr, list_images()))}")
    known = _SETS[name]
    if name == "digits":
        train, test = digits()
    else:
        if data_dir is None:
            raise FileNotFoundError(f"{name}: expected a data directory, got none. {_how_to_get(name)}")
        train, test = _cifar(name, data_dir, download)
    train, validation = train.split(VALIDATION_FRACTION, SPLIT_SEED)
    validation.name = f"{name} validation"
    return ImageSplits(
        train, validation, test, known.mean, known.std, known.crop_padding, known.flip, known.crop_probability
    )


@dataclass(frozen=True)
class _KnownSet:
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    folder: str = ""  # torchvision's, and its class
    torchvision_class: str = ""
    crop_probability: float = 1.0


# CIFAR-100 takes CIFAR-10's numbers, as in the AiT paper's code. The digits' are those of their training images. The
# mirror image of a digit is none, and a shift by one pixel is half a patch: on all images that is more than a short
# training can take, on a quarter of them it helps (experiments/README.md).
_CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_SETS = {
    "digits": _KnownSet(10, (0.3059,), (0.3764,), crop_padding=1, flip=False, crop_probability=0.25),
    "cifar10": _KnownSet(10, *_CIFAR_STATISTICS, 4, True, "cifar-10-batches-py", "CIFAR10"),
    "cifar100": _KnownSet(100, *_CIFAR_STATISTICS, 4, True, "cifar-100-python", "CIFAR100"),
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
            f"got {state}. {_how_to_get(name)}"
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
            raise ValueError(f"{expected}, got: {error} {_how_to_get(name)}") from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        splits.append(ImageDataset(images, torch.tensor(data.targets), data.classes, f"{name} {split}"))
    return splits[0], splits[1]


def _how_to_get(name: str) -> str:
    size = math.ceil({"cifar10": 170.5, "cifar100": 169.0}[name])
    return (
        f"To get it ({size} MB): ait.data.{name}('data', download=True), or train.py with --data-dir data --download; "
        "a folder made by ait.data.write_sheets will do as well."
    )
