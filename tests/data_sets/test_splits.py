"""Data sets by name: generated ones with their fixed test sets, fresh training images, and options that do not fit."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ait.data import ImageSplits, list_images, load_images, sort_of_clevr, splits, triangle

SMALL = {"triangle": (60, 20), "sort_of_clevr": (20, 5)}


@pytest.fixture(autouse=True)
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated sets with a handful of images."""
    known = {
        name: dataclasses.replace(each, sizes=SMALL[name]) if name in SMALL else each
        for name, each in splits._SETS.items()
    }
    monkeypatch.setattr(splits, "_SETS", known)


def _images(part: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


def test_sizes_are_those_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert splits._SETS["triangle"].sizes == (50_000, 10_000)
    assert splits._SETS["sort_of_clevr"].sizes == (9_800, 200)
    assert list_images() == sorted(
        ["digits", "cifar10", "cifar100", "triangle", "sort_of_clevr", "oxford_pet", "imagenet100", "image_folder"]
    )


def test_triangle_has_a_fixed_tenth_for_validation_and_its_own_test_images() -> None:
    first, again = load_images("triangle"), load_images("triangle", seed=7)
    assert (len(first.train), len(first.validation), len(first.test)) == (54, 6, 20)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).images, getattr(again, part).images)
        assert getattr(first, part).name == f"triangle {part}"
    assert first.training_set(1) is first.train and first.training_set(5) is first.train
    assert not _images(first.train) & _images(first.validation)
    assert not _images(first.test) & (_images(first.train) | _images(first.validation))
    assert first.question_dim is None


def test_sort_of_clevr_is_split_by_image_and_has_questions() -> None:
    parts = load_images("sort_of_clevr")
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (18 * 30, 2 * 30, 5 * 30)
    assert parts.question_dim == 18
    shown = [set(part.image_index.tolist()) for part in (parts.train, parts.validation)]
    held = [
        {part.images[index].numpy().tobytes() for index in part.image_index} for part in (parts.train, parts.validation)
    ]
    assert len(shown[0]) == 18 and len(shown[1]) == 2 and not held[0] & held[1]


@pytest.mark.parametrize("name", SMALL)
def test_fresh_images_differ_by_epoch_and_seed_and_repeat(name: str) -> None:
    fresh = load_images(name, fresh=True)
    fixed = load_images(name)
    assert torch.equal(fresh.test.images, fixed.test.images)
    sets = [_images(fresh.training_set(epoch)) for epoch in (1, 2, 3)]
    sets += [_images(fresh.validation), _images(fresh.test), _images(fixed.train)]
    sets += [_images(load_images(name, fresh=True, seed=1).training_set(1))]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert _images(load_images(name, fresh=True).training_set(2)) == sets[1]
    assert fresh.train is fresh.training_set(1) and _images(fresh.train) == sets[0]
    assert torch.equal(pickle.loads(pickle.dumps(fresh)).training_set(2).images, fresh.training_set(2).images)


@pytest.mark.parametrize("name", SMALL)
def test_statistics_are_those_of_the_images(name: str) -> None:
    images = triangle(2000, 5).images if name == "triangle" else sort_of_clevr(1000, 5).images
    parts: ImageSplits = load_images(name)
    inputs = parts.normalize(images)
    assert inputs.mean((0, 2, 3)).abs().max() < 0.02
    assert (inputs.std((0, 2, 3)) - 1).abs().max() < 0.02


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"fresh": True}, "digits: expected fresh=False"),
        ("digits", {"img_size": 32}, "digits: expected no img_size"),
        ("triangle", {"img_size": 32}, "triangle: expected no img_size"),
        ("triangle", {"download": True}, "triangle: expected download=False"),
        ("imagenet100", {"download": True}, "imagenet100: expected download=False"),
        ("mnist", {}, "no data set named 'mnist'; there are 'cifar10'"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(name, **options)


@pytest.mark.parametrize("name", ["cifar10", "oxford_pet", "imagenet100", "image_folder"])
def test_missing_folders_say_how_to_get_the_data(name: str) -> None:
    for folder in (None, "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{name}: expected .*(To get it|will do)"):
            load_images(name, folder)


def test_too_few_images_for_validation_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    with pytest.raises(ValueError, match="image_folder: expected at least 6 training images, a tenth of which"):
        load_images("image_folder", tmp_path, img_size=8)
