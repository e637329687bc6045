"""Oxford-IIIT Pet: read from torchvision's folder, and refused where it is not the original."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ait.data import ImageDataset, LazyImageDataset, folders, oxford_pet
from tests.data_sets.noise import save_noise, truncate

datasets = pytest.importorskip("torchvision.datasets")
transforms = pytest.importorskip("torchvision.transforms")

SIZE = 16


def _make_pets(root: Path) -> Path:
    """37 breeds in torchvision's layout: two training images and a test image of each."""
    folder = root / "oxford-iiit-pet"
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for label in range(37):
        for number in range(3):
            image_id = f"{'Big_cat' if label % 2 else 'dog'}_{label:02d}_{number}"
            save_noise(folder / "images" / f"{image_id}.jpg", 3 * label + number)
            lines["test" if number == 2 else "trainval"].append(f"{image_id} {label + 1} {label % 2 + 1} 1\n")
    (folder / "annotations").mkdir()
    for split, each in lines.items():
        (folder / "annotations" / f"{split}.txt").write_text("".join(each))
    return root


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folders, "PET_TRAIN_IMAGES", 74)
    monkeypatch.setattr(folders, "PET_TEST_IMAGES", 37)
    return _make_pets(tmp_path)


@pytest.mark.parametrize("limit", [0, 2**30])
def test_pets_are_read_from_torchvisions_folder(pets: Path, limit: int) -> None:
    transform = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.PILToTensor()])
    pair = oxford_pet(pets, img_size=SIZE, max_bytes_in_memory=limit)
    for data, split in zip(pair, ("trainval", "test"), strict=True):
        expected = datasets.OxfordIIITPet(pets, split, transform=transform)
        assert isinstance(data, ImageDataset if limit else LazyImageDataset)
        assert len(data) == len(expected) and list(data.classes) == expected.classes and len(data.classes) == 37
        for (image, label), (expected_image, expected_label) in zip(data, expected, strict=True):  # type: ignore[call-overload]
            assert torch.equal(image, expected_image) and label == expected_label
    assert [data.name for data in pair] == ["oxford_pet train", "oxford_pet test"]


def test_pets_that_are_there_are_not_downloaded_again(pets: Path) -> None:
    assert len(oxford_pet(pets, img_size=SIZE, download=True)[0]) == 74


def test_the_counts_of_the_original_are_expected(tmp_path: Path) -> None:
    assert (folders.PET_TRAIN_IMAGES, folders.PET_TEST_IMAGES, folders.PET_CLASSES) == (3680, 3669, 37)
    with pytest.raises(
        ValueError, match=r"trainval.txt: expected 3680 images of 37 classes, got 74 images, 37 class n"
    ):
        oxford_pet(_make_pets(tmp_path), img_size=SIZE)


def _edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


PET_DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (
        shutil.rmtree,
        FileNotFoundError,
        r"to hold .* got no 'images' and no 'annotations'\. To get it \(811",
    ),
    "no images": (lambda f: shutil.rmtree(f / "images"), FileNotFoundError, r"to hold .* got no 'images'\. To get it"),
    "no list": (lambda f: (f / "annotations/test.txt").unlink(), FileNotFoundError, r"no .*test\.txt\. To get it"),
    "no image": (lambda f: (f / "images/dog_04_2.jpg").unlink(), FileNotFoundError, r"test: no .*dog_04_2\.jpg"),
    "truncated image": (
        lambda f: truncate(f / "images/dog_04_0.jpg"),
        ValueError,
        r"train: .*dog_04_0\.jpg: expected a whole picture",
    ),
    "image taken off the list": (
        lambda f: _edit(f / "annotations/test.txt", lambda lines: lines[1:] + lines[1:2]),
        ValueError,
        r"test\.txt: expected 37 images of 37 classes, got 37 images, 36 class names and 36 labels; the file was alt",
    ),
    "shortened list": (
        lambda f: _edit(f / "annotations/trainval.txt", lambda lines: lines[:-1]),
        ValueError,
        r"trainval\.txt: expected 74 images of 37 classes, got 73 images",
    ),
    "label of another class": (
        lambda f: _edit(f / "annotations/trainval.txt", lambda lines: [lines[0].replace(" 1 ", " 2 ", 1), *lines[1:]]),
        ValueError,
        r"trainval\.txt: expected 74 images of 37 classes, got 74 images, 38 class names and 37 labels",
    ),
    "line without label": (
        lambda f: _edit(f / "annotations/trainval.txt", lambda lines: ["dog_00_0", *lines[1:]]),
        ValueError,
        r"trainval\.txt: expected the original list, got: not enough values",
    ),
    "label that is no number": (
        lambda f: _edit(f / "annotations/trainval.txt", lambda lines: ["dog_00_0 x 1 1", *lines[1:]]),
        ValueError,
        r"trainval\.txt: expected the original list, got: invalid literal",
    ),
    "image in both lists": (
        lambda f: _edit(f / "annotations/test.txt", lambda lines: ["dog_00_0 1 1 1", *lines[1:]]),
        ValueError,
        r"every image in one of trainval\.txt and test\.txt, got '.*dog_00_0\.jpg' in both",
    ),
    "classes differ": (
        lambda f: [
            (f / "images/dog_04_2.jpg").rename(f / "images/wolf_2.jpg"),
            _edit(f / "annotations/test.txt", lambda lines: [line.replace("dog_04_2", "wolf_2") for line in lines]),
        ],
        ValueError,
        "same classes for training and test, got 'Dog 04' for training alone and 'Wolf' for test alone",
    ),
}


@pytest.mark.parametrize("damage", PET_DAMAGES)
def test_an_altered_folder_of_pets_is_refused(pets: Path, damage: str) -> None:
    inflict, error, message = PET_DAMAGES[damage]
    inflict(pets / "oxford-iiit-pet")
    with pytest.raises(error, match=f"oxford_pet.*{message}"):
        oxford_pet(pets, img_size=SIZE)
