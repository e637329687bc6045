"""The data sets by name, split for an experiment: what is trained on, chosen on and tested on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ait.data.augment import normalize, random_crop, random_horizontal_flip
from ait.data.dataset import LabelledImages
from ait.data.folders import image_folder, imagenet100, oxford_pet
from ait.data.images import cifar10, cifar100, digits, how_to_get
from ait.data.sort_of_clevr import (
    SORT_OF_CLEVR_TEST_IMAGES,
    SORT_OF_CLEVR_TRAIN_IMAGES,
    QuestionDataset,
    sort_of_clevr,
)
from ait.data.triangle import TRIANGLE_TEST_IMAGES, TRIANGLE_TRAIN_IMAGES, triangle

SPLIT_SEED = 0  # of every validation split: part of the protocol, not a run's choice
VALIDATION_FRACTION = 0.1
# Of the generated sets, likewise; fresh training images draw their seeds from 2^32 on.
TRAIN_SEED, TEST_SEED, FRESH_VALIDATION_SEED = 0, 1, 2

Images = LabelledImages | QuestionDataset


@dataclass(frozen=True)
class ImageSplits:
    """A data set split for an experiment, and how its images become a model's input.

    Attributes:
        train: what a model learns from; with ``fresh``, the first epoch's.
        validation: a fixed tenth of the training images, stratified by class (of Sort-of-CLEVR by image): for every
            choice that is made.
        test: read once a run.
        mean: of each channel of images in [0, 1].
        std: the same for the standard deviation.
        crop_padding: padding of the random crop in pixels; 0 = no crop.
        flip: whether the mirror image of a class is one of the class, too.
        crop_probability: with which an image is cropped.
        fresh: makes the training images of an epoch, counted from 1; None where they stay the same.
    """

    train: Images
    validation: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    crop_probability: float = 1.0
    fresh: Callable[[int], Images] | None = None

    @property
    def question_dim(self) -> int | None:
        """Entries of a question; None for images alone."""
        return self.train.questions.shape[1] if isinstance(self.train, QuestionDataset) else None

    def training_set(self, epoch: int) -> Images:
        """What epoch ``epoch``, counted from 1, learns from."""
        return self.train if self.fresh is None or epoch == 1 else self.fresh(epoch)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random crop and flip of a batch ``(B, C, H, W)``, as far as this data set bears them."""
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, generator, self.crop_probability)
        return random_horizontal_flip(images, generator) if self.flip else images

    def normalize(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` uint8 to float32 with about zero mean and unit deviation a channel."""
        return normalize(images, self.mean, self.std)


@dataclass(frozen=True)
class _KnownSet:
    """What is known of a data set beforehand; the fields as in :class:`ImageSplits`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    crop_probability: float = 1.0
    # Exactly one of them: both sets from a folder, or n images from a seed with the two sizes.
    load: Callable[..., tuple[Any, Any]] | None = None
    generate: Callable[[int, int], Any] | None = None
    sizes: tuple[int, int] = (0, 0)
    img_size: int | None = None  # to which photographs are brought unless another is asked for


# CIFAR-100 takes CIFAR-10's numbers, as in the AiT paper's code; photographs ImageNet's, as torchvision's models do.
# Those of the digits, Triangle and Sort-of-CLEVR are of their training images. The mirror image of a digit is none, and
# a shift by one pixel is half a patch: on all images that is more than a short training can take, on a quarter of them
# it helps (experiments/README.md). Generated images need no augmentation, and "left" must stay left.
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 4, True)
_PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 8, True)
_SETS = {
    "digits": _KnownSet((0.3059,), (0.3764,), 1, False, 0.25, load=digits),
    "cifar10": _KnownSet(*_CIFAR, load=cifar10),
    "cifar100": _KnownSet(*_CIFAR, load=cifar100),
    "triangle": _KnownSet(
        (0.0220,) * 3, (0.1466,) * 3, generate=triangle, sizes=(TRIANGLE_TRAIN_IMAGES, TRIANGLE_TEST_IMAGES)
    ),
    "sort_of_clevr": _KnownSet(
        (0.9554, 0.9483, 0.9193),
        (0.1955, 0.2007, 0.2639),
        generate=sort_of_clevr,
        sizes=(SORT_OF_CLEVR_TRAIN_IMAGES, SORT_OF_CLEVR_TEST_IMAGES),
    ),
    "oxford_pet": _KnownSet(*_PHOTOGRAPHS, load=oxford_pet, img_size=128),
    "imagenet100": _KnownSet(*_PHOTOGRAPHS, load=imagenet100, img_size=128),
    "image_folder": _KnownSet(*_PHOTOGRAPHS, load=image_folder, img_size=128),
}
_DOWNLOADED = ("cifar10", "cifar100", "oxford_pet")


def list_images() -> list[str]:
    """Names that :func:`load_images` knows."""
    return sorted(_SETS)


def load_images(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    *,
    img_size: int | None = None,
    fresh: bool = False,
    seed: int = 0,
) -> ImageSplits:
    """Loads or generates a data set by name, with its fixed validation split, normalisation and augmentation.

    Args:
        name: one of :func:`list_images`.
        data_dir: where its files are; not needed for the digits and for what is generated.
        download: let torchvision download what is missing.
        img_size: side in pixels to which photographs are brought, 128 by default; other data have their own.
        fresh: generate new training images for every epoch (Triangle and Sort-of-CLEVR). Validation images then have a
            seed of their own; the test images are the same as without.
        seed: of the fresh training images.

    Raises:
        ValueError: no data set has this name, its files are altered, or it has no such option.
        FileNotFoundError: its files are missing.
        ImportError: a package that it needs is not installed.
    """
    if name not in _SETS:
        raise ValueError(f"load_images: no data set named {name!r}; there are {', '.join(map(repr, list_images()))}")
    known = _SETS[name]
    if img_size is not None and known.img_size is None:
        raise ValueError(f"{name}: expected no img_size, since its images have one size, got {img_size!r}")
    if fresh and known.generate is None:
        raise ValueError(f"{name}: expected fresh=False, since its images are not generated, got {fresh!r}")
    if download and name not in _DOWNLOADED:
        raise ValueError(f"{name}: expected download=False, since nobody offers it for download, got {download!r}")
    make_fresh = None
    if known.generate is not None:
        train_size, test_size = known.sizes
        test = _named(known.generate(test_size, TEST_SEED), f"{name} test")
        if fresh:
            make_fresh = functools.partial(_generate_epoch, name, seed)
            train = make_fresh(1)
            validation = known.generate(round(VALIDATION_FRACTION * train_size), FRESH_VALIDATION_SEED)
        else:
            train = _named(known.generate(train_size, TRAIN_SEED), f"{name} train")
            train, validation = train.split(VALIDATION_FRACTION, SPLIT_SEED)
    else:
        assert known.load is not None
        arguments: dict[str, Any] = {}
        if known.img_size is not None:
            arguments["img_size"] = known.img_size if img_size is None else img_size
        if name in _DOWNLOADED:
            arguments["download"] = download
        if name == "digits":
            train, test = known.load()
        elif data_dir is None:
            raise FileNotFoundError(f"{name}: expected a data directory, got none. {how_to_get(name)}")
        else:
            train, test = known.load(data_dir, **arguments)
        train, validation = train.split(VALIDATION_FRACTION, SPLIT_SEED)
    if len(validation) == 0:
        least = math.ceil(0.5 / VALIDATION_FRACTION) + 1
        raise ValueError(
            f"{name}: expected at least {least} training images, a tenth of which is validation, got {len(train)}"
        )
    _named(validation, f"{name} validation")
    augmentation = (known.crop_padding, known.flip, known.crop_probability)
    return ImageSplits(train, validation, test, known.mean, known.std, *augmentation, make_fresh)


def _generate_epoch(name: str, seed: int, epoch: int) -> Images:
    """The training images of an epoch: far from those of other epochs, runs, validation and test."""
    known = _SETS[name]
    assert known.generate is not None
    low, high = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint32).tolist()
    images: Images = known.generate(known.sizes[0], low + ((high >> 1 | 1) << 32))
    return _named(images, f"{name} train")


def _named(images: Images, name: str) -> Images:
    images.name = name
    return images
