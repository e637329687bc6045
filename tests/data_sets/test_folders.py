"""Photographs in folders: how they are found, brought to one size, held or decoded on the fly, and refused."""

from __future__ import annotations

import pickle
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ait.data import ImageDataset, LabelledImages, LazyImageDataset, folders, image_folder, imagenet100, oxford_pet
from tests.data_sets.noise import noise_pixels, save_noise, truncate

image_module = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("torchvision.datasets")
transforms = pytest.importorskip("torchvision.transforms")

SIZE = 16
CLASSES = ("cat", "dog", "frog")


def _make_folder(root: Path, test: str = "val", counts: tuple[int, int] = (5, 2)) -> Path:
    index = 0
    for split, count in zip(("train", test), counts, strict=True):
        for label in CLASSES:
            for number in range(count):
                extension = (".jpg", ".JPEG", ".png")[number % 3]
                save_noise(root / split / label / f"{number}{extension}", index)
                index += 1
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """15 training and 6 test pictures of three classes."""
    return _make_folder(tmp_path / "photos")


def _load(folder: Path, lazy: bool, **options: Any) -> tuple[LabelledImages, LabelledImages]:
    return image_folder(folder, img_size=SIZE, max_bytes_in_memory=0 if lazy else 2**30, **options)


def _in_memory(data: LabelledImages) -> ImageDataset:
    assert isinstance(data, ImageDataset)
    return data


def _one(folder: Path, path: Path) -> torch.Tensor:
    """The only picture of a folder that is made around ``path``."""
    for split in ("train", "val"):
        (folder / split / "one").mkdir(parents=True)
        shutil.copy(path, folder / split / "one" / path.name)
    return image_folder(folder, img_size=SIZE)[0][0][0]


@pytest.mark.parametrize("lazy", [False, True])
def test_images_are_what_torchvisions_folder_and_transforms_make(folder: Path, lazy: bool) -> None:
    transform = transforms.Compose(
        [transforms.Resize(SIZE, antialias=True), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
    )
    for data, split in zip(_load(folder, lazy), ("train", "val"), strict=True):
        expected = datasets.ImageFolder(folder / split, transform)
        assert len(data) == len(expected) and data.image_shape == (3, SIZE, SIZE)
        assert data.labels.tolist() == expected.targets and data.labels.dtype == torch.int64
        assert data.classes == CLASSES
        for (image, label), (expected_image, expected_label) in zip(data, expected, strict=True):  # type: ignore[call-overload]
            assert torch.equal(image, expected_image) and image.dtype == torch.uint8
            assert type(label) is int and label == expected_label


def test_resizing_averages_over_what_it_drops(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    image_module.fromarray(stripes).save(tmp_path / "stripes.png")
    image = _one(tmp_path / "photos", tmp_path / "stripes.png")[:, :, 1:-1]
    assert int(image.min()) > 110 and int(image.max()) < 145  # without antialiasing: 0 or 255


def test_crop_is_the_middle(tmp_path: Path) -> None:
    thirds = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    thirds[:, SIZE : 2 * SIZE] = 255
    image_module.fromarray(thirds).save(tmp_path / "thirds.png")
    assert int(_one(tmp_path / "photos", tmp_path / "thirds.png").min()) == 255


def test_size_alone_decides_between_memory_and_files(folder: Path) -> None:
    bytes_decoded = (15 + 6) * 3 * SIZE**2
    for limit, kind in ((bytes_decoded, ImageDataset), (bytes_decoded - 1, LazyImageDataset)):
        pair = image_folder(folder, img_size=SIZE, max_bytes_in_memory=limit)
        assert [type(data) for data in pair] == [kind, kind]
    assert folders.MAX_BYTES_IN_MEMORY == 4 * 2**30
    lazy, held = _load(folder, True)[0], _load(folder, False)[0]
    assert repr(lazy) == repr(held) == "image_folder train: 15 images of 3 x 16 x 16, 3 classes"


def _assert_same_batches(first: LabelledImages, second: LabelledImages, batch_size: int, seed: int | None) -> None:
    for drop_last in (False, True):
        generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        pairs = zip(
            *(
                data.batches(batch_size, generator=generator, drop_last=drop_last)
                for data, generator in zip((first, second), generators, strict=True)
            ),
            strict=True,
        )
        for (images, labels), (other_images, other_labels) in pairs:
            assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
            assert images.dtype == torch.uint8 and images.is_contiguous()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 15, 16])
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_in_memory_and_on_the_fly_are_identical(folder: Path, batch_size: int, seed: int | None) -> None:
    held, lazy = _load(folder, False)[0], _load(folder, True)[0]
    _assert_same_batches(held, lazy, batch_size, seed)
    _assert_same_batches(lazy, lazy, batch_size, seed)
    for indices in (torch.tensor([3, 0, 7, 7, -1]), torch.arange(0)):
        _assert_same_batches(held.subset(indices), lazy.subset(indices), batch_size, seed)
    for part, other in zip(held.split(0.2), lazy.split(0.2), strict=True):
        assert isinstance(other, LazyImageDataset)
        _assert_same_batches(part, other, batch_size, seed)
    assert lazy.subset(torch.tensor([2]), "two").name == "two" and len(lazy) == 15
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        lazy.batches(0)
    with pytest.raises(IndexError):
        lazy[15]


def test_more_files_than_are_waited_for_together_are_all_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _in_memory(_load(folder, False)[0]).images
    monkeypatch.setattr(folders, "_CHUNK", 4)
    assert torch.equal(_in_memory(_load(folder, False)[0]).images, expected)


def test_order_of_batches_does_not_depend_on_which_thread_is_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = _load(folder, False)[0]
    lazy = _load(folder, True)[0]
    assert isinstance(lazy, LazyImageDataset)
    lazy.threads = 5
    decode = LazyImageDataset._decode
    delays = iter(np.random.RandomState(0).uniform(0, 0.02, 1000).tolist())
    finished = []

    def decode_late(self: LazyImageDataset, path: str) -> np.ndarray:
        time.sleep(next(delays))
        image = decode(self, path)
        finished.append(path)
        return image

    monkeypatch.setattr(LazyImageDataset, "_decode", decode_late)
    _assert_same_batches(held, lazy, 4, None)
    assert finished[:15] != list(lazy.paths)


def test_exactly_one_batch_is_decoded_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = _load(folder, True)[0]
    decode = LazyImageDataset._decode
    started: list[str] = []

    def counted(self: LazyImageDataset, path: str) -> np.ndarray:
        started.append(path)
        return decode(self, path)

    monkeypatch.setattr(LazyImageDataset, "_decode", counted)
    batches = lazy.batches(4)
    assert not started
    for expected in (8, 12, 15, 15):
        next(batches)
        deadline = time.monotonic() + 10
        while len(started) < expected and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(started) == expected


def test_no_thread_outlives_a_pass_or_a_pass_left_early(folder: Path) -> None:
    lazy = _load(folder, True)[0]
    before = threading.active_count()
    list(lazy.batches(4))
    assert threading.active_count() == before
    batches = lazy.batches(4)
    next(batches)
    del batches
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_lazy_images_survive_pickle_and_work_with_a_data_loader(folder: Path, workers: int) -> None:
    lazy = _load(folder, True)[0]
    _assert_same_batches(pickle.loads(pickle.dumps(lazy)), lazy, 4, 0)
    images, labels = next(iter(torch.utils.data.DataLoader(lazy, batch_size=15, num_workers=workers)))
    expected = next(lazy.batches(15))
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def _grey(path: Path) -> np.ndarray:
    pixels = noise_pixels(0, SIZE, SIZE, 1)
    image_module.fromarray(pixels[:, :, 0]).save(path)
    return np.repeat(pixels, 3, axis=2)


def _grey_alpha(path: Path) -> np.ndarray:
    pixels = noise_pixels(0, SIZE, SIZE, 2)
    image_module.fromarray(pixels).save(path)
    return np.repeat(pixels[:, :, :1], 3, axis=2)


def _rgba(path: Path) -> np.ndarray:
    pixels = noise_pixels(0, SIZE, SIZE, 4)
    image_module.fromarray(pixels).save(path)
    return pixels[:, :, :3]


def _palette(path: Path) -> np.ndarray:
    colours, indices = noise_pixels(0, 7, 1)[0], noise_pixels(1, SIZE, SIZE, 1)[:, :, 0] % 7
    picture = image_module.fromarray(indices)
    picture.putpalette(colours.tobytes())
    picture.save(path)
    return colours[indices]


def _black_and_white(path: Path) -> np.ndarray:
    pixels = noise_pixels(0, SIZE, SIZE, 1) // 128 * 255
    image_module.fromarray(pixels[:, :, 0]).convert("1").save(path)
    return np.repeat(pixels, 3, axis=2)


MODES = {"L": _grey, "LA": _grey_alpha, "RGBA": _rgba, "P": _palette, "1": _black_and_white}


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_become_rgb_without_alpha(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.png"
    expected = MODES[mode](path)
    with image_module.open(path) as picture:
        assert picture.mode == mode
    np.testing.assert_array_equal(_one(tmp_path / "photos", path).permute(1, 2, 0), expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_more_than_8_bits_a_channel_are_refused_rather_than_cut_off(folder: Path, lazy: bool) -> None:
    path = folder / "train" / "dog" / "0.png"
    image_module.fromarray(np.full((SIZE, SIZE), 30000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: expected .* of 8 bits a channel, got .*'I;16'"):
        _load(folder, lazy)


def test_the_orientation_that_exif_records_is_ignored_as_torchvision_does(tmp_path: Path) -> None:
    exif = image_module.Exif()
    exif[0x0112] = 3  # upside down
    save_noise(tmp_path / "turned.jpg", 0, (SIZE, SIZE), exif=exif)
    save_noise(tmp_path / "plain.jpg", 0, (SIZE, SIZE))
    with image_module.open(tmp_path / "turned.jpg") as picture:
        assert picture.getexif()[0x0112] == 3
    turned, plain = (_one(tmp_path / stem, tmp_path / f"{stem}.jpg") for stem in ("turned", "plain"))
    assert torch.equal(turned, plain)


@pytest.mark.parametrize("broken", ["train/dog/0.jpg", "val/frog/0.jpg", "train/cat/2.png"])
def test_a_truncated_picture_is_named_at_load_in_memory_and_when_decoded_on_the_fly(folder: Path, broken: str) -> None:
    path = folder / broken
    truncate(path)
    message = rf"image_folder \w+: {re.escape(str(path))}: expected a whole picture .*, got {path.stat().st_size} bytes"
    with pytest.raises(ValueError, match=message):
        _load(folder, lazy=False)
    lazy = _load(folder, lazy=True)[broken.startswith("val")]
    assert isinstance(lazy, LazyImageDataset)
    index = lazy.paths.index(str(path))
    with pytest.raises(ValueError, match=message):
        lazy[index]
    taken = 0
    with pytest.raises(ValueError, match=message):
        for _, labels in lazy.batches(2):
            taken += len(labels)
    assert taken == index // 2 * 2  # all before it came through
    threads = [thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
    assert threads == []


def test_of_several_broken_pictures_the_first_is_named(folder: Path) -> None:
    for number in (0, 1, 3, 4):
        truncate(next((folder / "train" / "dog").glob(f"{number}.*")))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"dog.0\.jpg: expected a whole picture"):
            _load(folder, lazy=False)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_no_picture_is_named_at_load(folder: Path, lazy: bool, content: bytes) -> None:
    path = folder / "val" / "dog" / "1.JPEG"
    path.write_bytes(content)
    message = rf"image_folder test: {re.escape(str(path))}: expected a whole picture .*, got {len(content)} bytes"
    with pytest.raises(ValueError, match=message):
        _load(folder, lazy)


def test_a_file_that_goes_missing_is_named(folder: Path) -> None:
    lazy = _load(folder, True)[0]
    path = folder / "train" / "cat" / "0.jpg"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"image_folder train: no {path}")):
        next(lazy.batches(2))
    with pytest.raises(FileNotFoundError, match=re.escape(f"pets: no {path}")):
        LazyImageDataset([path], torch.zeros(1, dtype=torch.int64), CLASSES, "pets", img_size=SIZE)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, r"to hold the folders 'train', and 'val' or 'test', got no such f"),
    "no train": (lambda f: shutil.rmtree(f / "train"), FileNotFoundError, r"or 'test', got 'val'\. A folder with"),
    "no test set": (lambda f: shutil.rmtree(f / "val"), FileNotFoundError, r"or 'test', got 'train'\. A folder with"),
    "empty folder": (
        lambda f: [shutil.rmtree(f / "train"), shutil.rmtree(f / "val")],
        FileNotFoundError,
        r"or 'test', got a folder without them\. A folder with",
    ),
    "two test sets": (
        lambda f: shutil.copytree(f / "val", f / "test"),
        ValueError,
        "expected one test set, 'val' or 'test', got both",
    ),
    "class without images": (
        lambda f: _empty(f / "train" / "dog"),
        FileNotFoundError,
        "train: expected pictures in a folder for each class: .* classes dog",
    ),
    "class without pictures": (
        lambda f: [path.rename(path.with_suffix(".txt")) for path in (f / "val" / "cat").iterdir()],
        FileNotFoundError,
        "val: expected pictures in a folder for each class: .* classes cat",
    ),
    "no classes": (
        lambda f: [shutil.rmtree(f / "train"), (f / "train").mkdir()],
        FileNotFoundError,
        "train: expected pictures in a folder for each class: .*any class folder",
    ),
    "classes differ": (
        lambda f: [(f / "val" / "dog").rename(f / "val" / "hound"), shutil.rmtree(f / "val" / "frog")],
        ValueError,
        "same classes for training and test, got 'dog', 'frog' for training alone and 'hound' for test alone",
    ),
    "class of test alone": (
        lambda f: shutil.rmtree(f / "train" / "cat"),
        ValueError,
        "same classes for training and test, got none for training alone and 'cat' for test alone",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_as_expected_is_refused(folder: Path, damage: str) -> None:
    inflict, error, message = DAMAGES[damage]
    inflict(folder)
    with pytest.raises(error, match=f"photos: .*{message}|expected .*photos {message}"):
        image_folder(folder, img_size=SIZE, name="photos")


def test_the_test_set_may_be_called_test(tmp_path: Path) -> None:
    train, test = image_folder(_make_folder(tmp_path, "test", (2, 1)), img_size=SIZE, name="photos")
    assert (len(train), len(test), train.name, test.name) == (6, 3, "photos train", "photos test")


@pytest.mark.parametrize("img_size", [0, -1, 16.0, "16", True, None])
def test_a_wrong_img_size_is_refused_before_anything_is_read(tmp_path: Path, img_size: Any) -> None:
    for load in (image_folder, imagenet100, oxford_pet):
        with pytest.raises(
            ValueError, match=rf"{load.__name__}: expected an img_size of at least 1 pixel, got {img_size!r}"
        ):
            load(tmp_path / "none", img_size=img_size)


def test_lazy_images_refuse_labels_that_do_not_fit_and_no_threads(folder: Path) -> None:
    paths = [folder / "train" / "cat" / "0.jpg"] * 2
    with pytest.raises(ValueError, match=r"pets: expected 2 labels, one a picture, got shape \(3,\)"):
        LazyImageDataset(paths, torch.zeros(3, dtype=torch.int64), CLASSES, "pets", img_size=SIZE)
    with pytest.raises(ValueError, match=r"pets: expected labels in \[0, 3\), got \[0, 3\]"):
        LazyImageDataset(paths, torch.tensor([0, 3]), CLASSES, "pets", img_size=SIZE)
    with pytest.raises(ValueError, match="pets: expected at least 1 thread, got 0"):
        LazyImageDataset(paths, torch.tensor([0, 1]), CLASSES, "pets", img_size=SIZE, threads=0)


def test_imagenet100_is_a_folder_of_100_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in range(100):
            save_noise(tmp_path / split / f"n{label:08d}" / "0.JPEG", label, (10, 12))
    train, test = imagenet100(tmp_path, img_size=8)
    assert train.labels.tolist() == test.labels.tolist() == list(range(100))
    assert (train.name, test.name) == ("imagenet100 train", "imagenet100 test")
    assert isinstance(imagenet100(tmp_path, img_size=8, max_bytes_in_memory=0)[0], LazyImageDataset)
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split / "n00000007")
    with pytest.raises(ValueError, match=r"imagenet100: .*: expected 100 classes, got 99\. To get it.*image-net"):
        imagenet100(tmp_path, img_size=8)


def test_missing_imagenet100_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"imagenet100: expected .* got no such folder\. To get it.*image-net"):
        imagenet100(tmp_path / "none", img_size=8)


@pytest.mark.parametrize("module", ["torchvision.datasets", "torchvision.transforms.functional", "PIL.Image"])
def test_a_missing_package_is_answered_with_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module} .*pip install "associative-transformer\[data\]"'):
        _load(folder, lazy=True)
