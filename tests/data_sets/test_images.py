"""The data sets by name: digits, CIFAR in both of its forms, and what is said where they are missing."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ait.data import cifar10, cifar100, digits, list_images, load_images, write_sheets
from tests.data_sets.noise import noise_images

# Recorded: all models are judged on these 360.
DIGITS_TEST_SHA256 = "8af2db9e7ab2dc9e48e69645046dd611b60e85016a0932c279db5feed7d9fa48"

HEAVY = ("PIL", "cv2", "sklearn", "torchvision", "scipy")


def _cifar_sheets(folder: Path, num_classes: int = 10) -> Path:
    pytest.importorskip("PIL")
    generator = torch.Generator().manual_seed(0)
    train, test = (noise_images(count, (3, 32, 32), generator, num_classes) for count in (100, 20))
    write_sheets(folder, train, test, [f"class {index}" for index in range(num_classes)], grid=(5, 5))
    return folder


def test_digits_are_scikit_learns_with_a_fixed_stratified_test_set() -> None:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = digits()
    assert (len(train), len(test), train.image_shape) == (1437, 360, (1, 8, 8))
    class_sizes = np.bincount(bunch.target)
    assert np.abs(test.labels.bincount().numpy() - 360 * class_sizes / 1797).max() < 1
    # Every image of the source is in one of the two, with its label; grey level g became round(255 g / 16).
    levels = torch.cat([train.images, test.images]).flatten(1).double() * 16 / 255
    ours = np.column_stack([np.rint(levels.numpy()), torch.cat([train.labels, test.labels]).numpy()])
    theirs = np.column_stack([bunch.data, bunch.target])
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    assert hashlib.sha256(test.images.numpy().tobytes()).hexdigest() == DIGITS_TEST_SHA256


def test_digits_validation_is_a_fixed_tenth_and_statistics_are_those_of_training() -> None:
    pytest.importorskip("sklearn")
    splits = load_images("digits")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1293, 144, 360)
    assert (splits.validation.labels.bincount() - 14.4).abs().max() < 1
    inputs = torch.cat([splits.normalize(part.images) for part in (splits.train, splits.validation)])
    assert abs(inputs.mean().item()) < 2e-3 and abs(inputs.std().item() - 1) < 2e-3
    again = load_images("digits")
    assert torch.equal(again.validation.images, splits.validation.images)
    assert torch.equal(pickle.loads(pickle.dumps(splits)).train.images, splits.train.images)


def test_cifar_is_read_from_contact_sheets_with_crop_and_flip(tmp_path: Path) -> None:
    splits = load_images("cifar10", _cifar_sheets(tmp_path / "ten"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 20)
    assert splits.validation.labels.bincount().tolist() == [1] * 10
    assert (splits.crop_padding, splits.flip) == (4, True)
    train, _ = cifar100(_cifar_sheets(tmp_path / "hundred", 100))
    assert len(train.classes) == 100


def test_sheets_of_another_data_set_are_refused(tmp_path: Path) -> None:
    folder = _cifar_sheets(tmp_path / "hundred", 100)
    with pytest.raises(ValueError, match=r"cifar10: .*expected images .* in 10 classes, got .* 100 classes"):
        cifar10(folder)


def _fake_torchvision(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A CIFAR-10 of 5 x 20 + 20 images in torchvision's form, whose checksums torchvision is told to expect."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (120, 3072), dtype=np.uint8)
    files = {f"data_batch_{index + 1}": slice(20 * index, 20 * index + 20) for index in range(5)}
    files["test_batch"] = slice(100, 120)
    content = {name: {"data": pixels[part], "labels": list(range(10)) * 2} for name, part in files.items()}
    content["batches.meta"] = {"label_names": [f"class {index}" for index in range(10)]}
    checksums = {}
    for name, each in content.items():
        (folder / name).write_bytes(pickle.dumps(each))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    train_list = [[name, checksums[name]] for name in files if name != "test_batch"]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train_list)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return pixels


def test_cifar_is_read_from_torchvisions_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = _fake_torchvision(tmp_path, monkeypatch)
    train, test = cifar10(tmp_path)
    assert np.array_equal(torch.cat([train.images, test.images]), pixels.reshape(-1, 3, 32, 32))
    assert train.labels.tolist() == list(range(10)) * 10 and test.classes[3] == "class 3"
    assert train.images.is_contiguous()


def test_an_altered_file_of_torchvisions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_torchvision(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cifar-10-batches-py: expected files with the checksums of the original"):
        cifar10(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_data_says_what_was_looked_for_and_how_to_get_it(tmp_path: Path, name: str) -> None:
    for data_dir, state in ((tmp_path / "none", "no such folder"), (tmp_path, "a folder without either")):
        with pytest.raises(FileNotFoundError, match=rf"{name}: expected .* got {state}\. To get it .*download=True"):
            load_images(name, data_dir)
    with pytest.raises(FileNotFoundError, match=f"{name}: expected a data directory, got none. To get it"):
        load_images(name)


def test_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"no data set named 'mnist'; there are 'cifar10', 'cifar100', 'digits', "):
        load_images("mnist")
    assert {"cifar10", "cifar100", "digits"} <= set(list_images())


@pytest.mark.parametrize(
    ("module", "name"), [("sklearn.datasets", "digits"), ("PIL.Image", "cifar10"), ("torchvision.datasets", "cifar10")]
)
def test_a_missing_package_is_answered_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    folder = tmp_path / "data"
    if module == "PIL.Image":
        _cifar_sheets(folder)
    elif name == "cifar10":
        (folder / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module} .*pip install "associative-transformer\[data\]"'):
        load_images(name, folder)


def test_importing_needs_none_of_the_optional_packages() -> None:
    code = f"import sys, ait, ait.data; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
