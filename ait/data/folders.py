"""Photographs in folders: ImageNet100, Oxford-IIIT Pet, and every folder with one subfolder a class.

Pictures come in many sizes. Each is converted to RGB (an alpha channel is dropped; the orientation that EXIF records is
ignored, as torchvision does), its shorter side brought to ``img_size`` pixels with antialiasing, and the square in the
middle cut out. Sets that fit are decoded once and held in memory; a larger one is decoded whenever a batch is taken.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ait.data._optional import require
from ait.data.dataset import ImageDataset, LabelledImages
from ait.data.images import how_to_get

IMAGENET100_CLASSES = 100
PET_TRAIN_IMAGES = 3_680
PET_TEST_IMAGES = 3_669
PET_CLASSES = 37
MAX_BYTES_IN_MEMORY = 4 * 2**30
PET_FOLDER = "oxford-iiit-pet"  # torchvision's, within the data directory

_CHUNK = 256  # files that are waited for together


class LazyImageDataset(LabelledImages):
    """Images that stay in their files and are decoded in threads, one batch ahead of the one that is used.

    The headers of all files are read at once, so that most broken files are named before a training starts. A file
    whose header is whole and whose rest is not is named by the ``ValueError`` of the batch or item that needs it.

    Args:
        paths: ``n`` pictures in any format that Pillow reads, of 8 bits a channel.
        labels: ``(n,)`` of an integer dtype, each in ``[0, len(classes))``.
        classes: name of each class.
        name: what errors call this data set.
        img_size: side of an image in pixels; images are ``(3, img_size, img_size)`` uint8.
        threads: that decode; by default one a processor, up to 8. Batches do not depend on it.

    Raises:
        ValueError: an argument is not as above, or a file is no picture.
        FileNotFoundError: a file is missing.
        ImportError: Pillow or torchvision is not installed.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Tensor,
        classes: Sequence[str],
        name: str = "LazyImageDataset",
        *,
        img_size: int,
        threads: int | None = None,
    ) -> None:
        _check_img_size(img_size, name)
        if labels.shape != (len(paths),):
            raise ValueError(f"{name}: expected {len(paths)} labels, one a picture, got shape {tuple(labels.shape)}")
        if threads is None:
            threads = min(8, os.cpu_count() or 1)
        if threads < 1:
            raise ValueError(f"{name}: expected at least 1 thread, got {threads!r}")
        super().__init__(labels, classes, name)
        self.paths = tuple(map(str, paths))
        self.img_size = img_size
        self.threads = threads
        require("torchvision.transforms.functional", name)
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(self), _CHUNK):
                list(pool.map(self._read_header, self.paths[start : start + _CHUNK]))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._decode(self.paths[index])), int(self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.img_size, self.img_size

    @property
    def bytes_decoded(self) -> int:
        """What the images would take in memory."""
        return len(self) * 3 * self.img_size**2

    def subset(self, indices: Tensor, name: str | None = None) -> LazyImageDataset:
        part = super().subset(indices, name)
        part.paths = tuple(self.paths[index] for index in indices.tolist())
        return part

    def in_memory(self) -> ImageDataset:
        """All images, decoded; the first broken file in stored order is named by a ``ValueError``."""
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        start = 0
        for decoded, _ in self.batches(_CHUNK):
            images[start : start + len(decoded)] = decoded
            start += len(decoded)
        return ImageDataset(images, self.labels, self.classes, self.name)

    def _take(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        pool = ThreadPoolExecutor(self.threads)
        under_way: deque[list[Future[np.ndarray]]] = deque()
        try:
            for chosen in batches:
                under_way.append([pool.submit(self._decode, self.paths[index]) for index in chosen.tolist()])
                if len(under_way) == 2:
                    yield _stack(under_way.popleft())
            if under_way:
                yield _stack(under_way.popleft())
        finally:
            # Also where a file is broken or the caller leaves the loop early.
            pool.shutdown(cancel_futures=True)

    def _read_header(self, path: str) -> None:
        with self._opened(path):
            pass

    def _decode(self, path: str) -> np.ndarray:
        """``(3, img_size, img_size)`` uint8."""
        functional = require("torchvision.transforms.functional", self.name)
        with self._opened(path) as picture:
            square = functional.center_crop(functional.resize(picture.convert("RGB"), self.img_size), self.img_size)
            return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    @contextmanager
    def _opened(self, path: str) -> Iterator[Any]:
        """A Pillow image of which the header is read; what is broken, there or in the body of ``with``, is named."""
        pil_image = require("PIL.Image", self.name)
        try:
            with pil_image.open(path) as picture:
                # Pillow would cut their values off at 255, which makes most of such a picture white.
                if picture.mode.startswith(("I", "F")):
                    raise ValueError(f"a picture of Pillow's mode {picture.mode!r}")
                yield picture
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.name}: no {path}") from error
        except (OSError, SyntaxError, EOFError, RuntimeError, ValueError, pil_image.DecompressionBombError) as error:
            expected = "expected a whole picture of 8 bits a channel"
            raise ValueError(f"{self.name}: {path}: {expected}, got {os.path.getsize(path)} bytes: {error}") from error


def _stack(images: list[Future[np.ndarray]]) -> Tensor:
    """``(B, 3, H, W)``; if several files are broken, the first of the batch is named at every run."""
    return torch.from_numpy(np.stack([image.result() for image in images]))


def image_folder(
    data_dir: str | Path,
    *,
    img_size: int,
    name: str = "image_folder",
    max_bytes_in_memory: int = MAX_BYTES_IN_MEMORY,
) -> tuple[LabelledImages, LabelledImages]:
    """A folder with ``train/CLASS/*.jpg``, and ``val/CLASS/*.jpg`` or ``test/CLASS/*.jpg`` as the test set.

    Files are found by torchvision's ``ImageFolder``: below a class at any depth, in the order of their names, by the
    extensions jpg, jpeg, png, ppm, bmp, pgm, tif, tiff and webp; others are passed over.

    Args:
        data_dir: the folder that holds ``train``.
        img_size: side in pixels to which pictures are brought.
        name: what errors and the data sets' names begin with.
        max_bytes_in_memory: what training and test images, decoded, may take together. Up to it both are an
            :class:`ImageDataset`, beyond it a :class:`LazyImageDataset`, with the same items and batches. Splitting a
            set in memory copies it: allow for twice as much.

    Returns:
        Training and test images ``(3, img_size, img_size)`` uint8; a class's label is its place among the sorted names.

    Raises:
        FileNotFoundError: ``data_dir``, one of its folders, or every image of a class is missing.
        ValueError: ``img_size < 1``; ``val`` and ``test`` are both there; their classes are not those of ``train``; or
            a file is broken (of a lazy set: its header is).
        ImportError: torchvision is not installed.
    """
    return _image_folder(data_dir, img_size, name, max_bytes_in_memory, how_to_get("image_folder"))


def imagenet100(
    data_dir: str | Path, *, img_size: int, max_bytes_in_memory: int = MAX_BYTES_IN_MEMORY
) -> tuple[LabelledImages, LabelledImages]:
    """ImageNet100, 100 classes of ImageNet-1K: an :func:`image_folder` of which 100 classes are expected.

    At 224 pixels its 126,000 training images take 19 GB, beyond the limit.

    Raises:
        ValueError: there are more classes, or fewer; or as :func:`image_folder`, likewise the other errors.

    Source: the common choice of classes is that of Y. Tian, D. Krishnan, P. Isola, Contrastive Multiview Coding, 2020,
    ``imagenet100.txt`` of its published code.
    """
    how = how_to_get("imagenet100")
    return _image_folder(data_dir, img_size, "imagenet100", max_bytes_in_memory, how, IMAGENET100_CLASSES)


def oxford_pet(
    data_dir: str | Path,
    *,
    img_size: int,
    download: bool = False,
    max_bytes_in_memory: int = MAX_BYTES_IN_MEMORY,
) -> tuple[LabelledImages, LabelledImages]:
    """Oxford-IIIT Pet: 3,680 training (its ``trainval``) and 3,669 test images of 37 breeds of cats and dogs.

    Args:
        data_dir: holds torchvision's ``oxford-iiit-pet``, with its ``images`` and ``annotations``.
        img_size: side in pixels to which pictures are brought.
        download: let torchvision download the set into ``data_dir`` if it is not there.
        max_bytes_in_memory: as for :func:`image_folder`.

    Returns:
        Training and test images ``(3, img_size, img_size)`` uint8.

    Raises:
        FileNotFoundError: the folder or a file that its lists name is missing.
        ValueError: ``img_size < 1``; lists or files were altered: their numbers of images or classes are not those
            above, an image is in both lists, or a file is broken.
        ImportError: torchvision is not installed.

    Source: O. Parkhi, A. Vedaldi, A. Zisserman, C. V. Jawahar, Cats and Dogs, CVPR 2012.
    """
    name, data_dir = "oxford_pet", Path(data_dir)
    _check_img_size(img_size, name)
    folder = data_dir / PET_FOLDER
    missing = [part for part in ("images", "annotations") if not (folder / part).is_dir()]
    if missing and not download:
        state = "no " + " and no ".join(map(repr, missing))
        raise FileNotFoundError(
            f"{name}: expected {folder} to hold 'images' and 'annotations', got {state}. {how_to_get(name)}"
        )
    parts = [
        _read_pet_list(data_dir, split, count, download)
        for split, count in (("trainval", PET_TRAIN_IMAGES), ("test", PET_TEST_IMAGES))
    ]
    (train_paths, _, classes), (test_paths, _, test_classes) = parts
    _check_same_classes(classes, test_classes, folder / "annotations", name)
    shared = sorted(set(train_paths) & set(test_paths))
    if shared:
        raise ValueError(
            f"{name}: {folder / 'annotations'}: expected every image in one of trainval.txt and test.txt, "
            f"got {_some(shared)} in both; the files were altered. {how_to_get(name)}"
        )
    train, test = (
        LazyImageDataset(paths, labels, classes, f"{name} {split}", img_size=img_size)
        for split, (paths, labels, _) in zip(("train", "test"), parts, strict=True)
    )
    return _in_memory_if_small(train, test, max_bytes_in_memory)


def _image_folder(
    data_dir: str | Path, img_size: int, name: str, max_bytes: int, how: str, num_classes: int | None = None
) -> tuple[LabelledImages, LabelledImages]:
    data_dir = Path(data_dir)
    _check_img_size(img_size, name)
    there = [split for split in ("train", "val", "test") if (data_dir / split).is_dir()]
    if "train" not in there or len(there) == 1:
        state = " and ".join(map(repr, there)) or "a folder without them" if data_dir.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{name}: expected {data_dir} to hold the folders 'train', and 'val' or 'test', got {state}. {how}"
        )
    if len(there) == 3:
        raise ValueError(
            f"{name}: {data_dir}: expected one test set, 'val' or 'test', got both; move the other elsewhere "
            "(validation images are split off the training images)"
        )
    found = [_find_pictures(data_dir / split, name) for split in there]
    classes = found[0].classes
    _check_same_classes(classes, found[1].classes, data_dir, name)
    if num_classes is not None and len(classes) != num_classes:
        raise ValueError(f"{name}: {data_dir}: expected {num_classes} classes, got {len(classes)}. {how}")
    train, test = (
        LazyImageDataset(
            [path for path, _ in part.samples],
            torch.tensor(part.targets),
            classes,
            f"{name} {split}",
            img_size=img_size,
        )
        for split, part in zip(("train", "test"), found, strict=True)
    )
    return _in_memory_if_small(train, test, max_bytes)


def _find_pictures(folder: Path, name: str) -> Any:
    """A torchvision ``ImageFolder``, for its ``classes``, ``samples`` and ``targets``."""
    datasets = require("torchvision.datasets", name)
    try:
        return datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {folder}: expected pictures in a folder for each class: {error}") from error


def _read_pet_list(data_dir: Path, split: str, count: int, download: bool) -> tuple[list[str], Tensor, list[str]]:
    """Paths, labels and class names of ``trainval`` or ``test``."""
    name, path = "oxford_pet", data_dir / PET_FOLDER / "annotations" / f"{split}.txt"
    datasets = require("torchvision.datasets", name)
    try:
        pets = datasets.OxfordIIITPet(data_dir, split, download=download)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no {path}. {how_to_get(name)}") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {path}: expected the original list, got: {error}. {how_to_get(name)}") from error
    # torchvision has no public name for them, and its items do not tell which file they came from.
    paths, labels = [str(each) for each in pets._images], torch.tensor(pets._labels, dtype=torch.int64)
    got = len(paths), len(pets.classes), labels.unique().tolist()
    if got != (count, PET_CLASSES, list(range(PET_CLASSES))):
        raise ValueError(
            f"{name}: {path}: expected {count} images of {PET_CLASSES} classes, got {len(paths)} images, "
            f"{len(pets.classes)} class names and {len(got[2])} labels; the file was altered. {how_to_get(name)}"
        )
    return paths, labels, pets.classes


def _in_memory_if_small(
    train: LazyImageDataset, test: LazyImageDataset, max_bytes: int
) -> tuple[LabelledImages, LabelledImages]:
    if train.bytes_decoded + test.bytes_decoded > max_bytes:
        return train, test
    return train.in_memory(), test.in_memory()


def _check_img_size(img_size: int, name: str) -> None:
    if type(img_size) is not int or img_size < 1:
        raise ValueError(f"{name}: expected an img_size of at least 1 pixel, got {img_size!r}")


def _check_same_classes(train: Sequence[str], test: Sequence[str], where: Path, name: str) -> None:
    if list(train) != list(test):
        only_train, only_test = sorted(set(train) - set(test)), sorted(set(test) - set(train))
        raise ValueError(
            f"{name}: {where}: expected the same classes for training and test, got {_some(only_train)} for training "
            f"alone and {_some(only_test)} for test alone"
        )


def _some(names: Sequence[str]) -> str:
    """Names for a message, of many the first five."""
    listed = ", ".join(map(repr, names[:5])) or "none"
    return f"{listed} and {len(names) - 5} more" if len(names) > 5 else listed
