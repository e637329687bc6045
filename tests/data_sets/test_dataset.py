"""Images in memory: items, batches, and the stratified split."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest
import torch
from torch.utils.data import DataLoader

from ait.data import ImageDataset, stratified_choice
from tests.data_sets.noise import CLASSES, noise_images


@pytest.fixture
def data() -> ImageDataset:
    images, labels = noise_images(50, (3, 4, 5), torch.Generator().manual_seed(1))
    return ImageDataset(images, labels, CLASSES, "noise")


def test_item_is_an_image_of_bytes_and_a_plain_integer(data: ImageDataset) -> None:
    image, label = data[7]
    assert image.shape == (3, 4, 5) and image.dtype == torch.uint8
    assert type(label) is int and label == 1
    assert torch.equal(data[-1][0], data.images[49])
    with pytest.raises(IndexError):
        data[50]


def test_in_order_batches_are_the_images_in_stored_order(data: ImageDataset) -> None:
    batches = list(data.batches(16))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), data.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)


def test_shuffled_batches_hold_every_image_once_with_its_label_and_repeat_under_a_seed(data: ImageDataset) -> None:
    first, second = (
        list(data.batches(16, generator=torch.Generator().manual_seed(3), drop_last=False)) for _ in range(2)
    )
    images, labels = (torch.cat(parts) for parts in zip(*first, strict=True))
    assert not torch.equal(images, data.images)
    by_content = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    expected = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}
    assert len(expected) == 50 and by_content == expected
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_drop_last_leaves_out_the_smaller_batch(data: ImageDataset) -> None:
    assert [len(labels) for _, labels in data.batches(16, drop_last=True)] == [16, 16, 16]
    assert list(data.batches(64, drop_last=True)) == []


def test_batch_size_below_one_is_refused_at_once(data: ImageDataset) -> None:
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        data.batches(0)


def test_survives_pickle(data: ImageDataset) -> None:
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.images, data.images) and torch.equal(copy.labels, data.labels)
    assert (copy.classes, copy.name, repr(copy)) == (data.classes, data.name, repr(data))


@pytest.mark.parametrize("workers", [0, 1])
def test_works_with_a_data_loader(data: ImageDataset, workers: int) -> None:
    images, labels = next(iter(DataLoader(data, batch_size=8, num_workers=workers)))
    assert torch.equal(images, data.images[:8]) and torch.equal(labels, data.labels[:8])


def test_split_is_disjoint_whole_stratified_and_repeats() -> None:
    images, labels = noise_images(300, (1, 2, 2), torch.Generator().manual_seed(1))
    images = torch.arange(300).view(300, 1, 1, 1).expand(300, 1, 2, 2).to(torch.uint8)  # 256 values, 44 twice
    data = ImageDataset(images, labels, CLASSES)
    rest, share = data.split(0.1, seed=5)
    assert share.labels.bincount().tolist() == [10, 10, 10] and rest.labels.bincount().tolist() == [90, 90, 90]
    values = torch.cat([rest.images, share.images])[:, 0, 0, 0].sort().values
    assert torch.equal(values, images[:, 0, 0, 0].sort().values)
    again = data.split(0.1, seed=5)
    assert torch.equal(again[1].images, share.images)
    assert not torch.equal(data.split(0.1, seed=6)[1].images, share.images)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_choice_gives_every_class_its_share_to_the_nearest_whole_item(count: int) -> None:
    labels = torch.tensor([0] * 61 + [1] * 28 + [2] * 1 + [5] * 10)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    chosen = stratified_choice(labels, count, seed=0)
    assert len(chosen) == count == len(chosen.unique())
    assert torch.equal(chosen, chosen.sort().values)
    for label in (0, 1, 2, 5):
        share = Fraction(count * int((labels == label).sum()), 100)
        assert abs(int((labels[chosen] == label).sum()) - share) < 1


def test_choice_never_changes() -> None:
    labels = torch.arange(40) % 4
    # Recorded: results are compared over years on what a seed chose.
    assert stratified_choice(labels, 8, seed=0).tolist() == [7, 8, 10, 13, 14, 21, 27, 32]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_split_refuses_a_fraction_outside_zero_to_one(data: ImageDataset, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"noise: expected a fraction in \(0, 1\), got"):
        data.split(fraction)


@pytest.mark.parametrize("count", [-1, 41])
def test_choice_refuses_a_count_that_is_not_there(count: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a count in \[0, 40\], got {count}"):
        stratified_choice(torch.arange(40) % 4, count, seed=0)


IMAGES = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.float(), LABELS, r"expected images \(n, C, H, W\) of dtype torch.uint8, got .* torch.float32"),
        (IMAGES[0], LABELS, r"expected images \(n, C, H, W\) of dtype torch.uint8, got \(1, 2, 2\)"),
        (IMAGES, LABELS.float(), r"expected labels of an integer dtype, got torch.float32"),
        (IMAGES, LABELS > 0, r"expected labels of an integer dtype, got torch.bool"),
        (IMAGES, LABELS[:3], r"expected 4 labels, one an image, got shape \(3,\)"),
        (IMAGES, LABELS + 1, r"expected labels in \[0, 3\), got \[1, 3\]"),
        (IMAGES, LABELS - 1, r"expected labels in \[0, 3\), got \[-1, 1\]"),
    ],
)
def test_refuses_what_is_no_labelled_image_set(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="pets: " + message):
        ImageDataset(images, labels, CLASSES, "pets")
