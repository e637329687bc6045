"""Whole-batch augmentation equals the image by image evaluation, bit for bit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from ait.data import (
    ImageDataset,
    ImageSplits,
    crop_padded,
    flip_horizontally,
    normalize,
    random_crop,
    random_horizontal_flip,
)
from tests.data_sets.noise import CLASSES, noise_images

SHAPES = [(3, 32, 32), (1, 8, 8), (2, 5, 7)]


def _images(shape: tuple[int, int, int], count: int = 11) -> torch.Tensor:
    return noise_images(count, shape, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_equals_padding_and_cutting_each_image(shape: tuple[int, int, int], padding: int) -> None:
    images = _images(shape)
    generator = torch.Generator().manual_seed(3)
    batch = random_crop(images, padding, generator)
    offsets = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=torch.Generator().manual_seed(3))
    assert batch.dtype == torch.uint8
    for image, cropped, (row, column) in zip(images, batch, offsets.tolist(), strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
        np.testing.assert_array_equal(cropped, padded[:, row : row + shape[1], column : column + shape[2]])


def test_crop_draws_every_offset_alike() -> None:
    mark = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    mark[:, 0, 2, 2] = 1
    cropped = random_crop(mark, 1, torch.Generator().manual_seed(0))
    counts = cropped.sum(0, dtype=torch.int64)[0]
    assert int(counts.sum()) == 4000 and int((counts > 0).sum()) == 9
    assert int(counts[1:4, 1:4].min()) > 4000 / 9 - 5 * 20 and int(counts.max()) < 4000 / 9 + 5 * 20  # 5 deviations


def test_crop_with_a_probability_leaves_the_other_images_where_they_were() -> None:
    mark = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    mark[:, 0, 2, 2] = 1
    stayed = int(random_crop(mark, 1, torch.Generator().manual_seed(0), probability=0.25)[:, 0, 2, 2].sum())
    assert abs(stayed - 4000 * (0.75 + 0.25 / 9)) < 5 * 27  # 5 deviations
    assert torch.equal(random_crop(mark, 1, torch.Generator().manual_seed(0), probability=0.0), mark)


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_equals_reversing_each_chosen_image(shape: tuple[int, int, int]) -> None:
    images = _images(shape, 40)
    batch = random_horizontal_flip(images, torch.Generator().manual_seed(4))
    chosen = torch.rand(40, generator=torch.Generator().manual_seed(4)) < 0.5
    assert 5 < int(chosen.sum()) < 35
    for image, flipped, flip in zip(images, batch, chosen.tolist(), strict=True):
        np.testing.assert_array_equal(flipped, image.numpy()[:, :, ::-1] if flip else image.numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_equals_the_arithmetic_of_each_channel(shape: tuple[int, int, int]) -> None:
    images, channels = _images(shape), shape[0]
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    batch = normalize(images, mean, std)
    assert batch.dtype == torch.float32
    for image, normalized in zip(images, batch, strict=True):
        for channel in range(channels):
            direct = (image[channel].numpy().astype(np.float32) / np.float32(255) - np.float32(mean[channel])) / (
                np.float32(std[channel])
            )
            np.testing.assert_array_equal(normalized[channel], direct)


def test_augmentation_leaves_its_input_alone_and_takes_an_empty_batch() -> None:
    images, before = _images((3, 6, 6)), _images((3, 6, 6))
    generator = torch.Generator().manual_seed(0)
    random_crop(images, 2, generator)
    random_horizontal_flip(images, generator)
    normalize(images, [0.5] * 3, [0.5] * 3)
    assert torch.equal(images, before)
    empty = images[:0]
    assert random_horizontal_flip(random_crop(empty, 2, generator), generator).shape == (0, 3, 6, 6)


def test_splits_augment_as_their_data_set_bears() -> None:
    images = _images((1, 8, 8))
    data = ImageDataset(images, torch.zeros(11, dtype=torch.int64), CLASSES)
    still = ImageSplits(data, data, data, (0.5,), (0.5,), crop_padding=0, flip=False)
    moved = ImageSplits(data, data, data, (0.5,), (0.5,), crop_padding=2, flip=True)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(still.augment(images, generator), images)
    expected_generator = torch.Generator().manual_seed(0)
    expected = random_horizontal_flip(random_crop(images, 2, expected_generator), expected_generator)
    assert torch.equal(pickle.loads(pickle.dumps(moved)).augment(images, generator), expected)
    assert torch.equal(still.normalize(images), normalize(images, (0.5,), (0.5,)))


def test_refuses_what_does_not_fit_the_batch() -> None:
    images = _images((3, 6, 6), 2)
    offsets = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected offsets of shape \(2, 2\), got \(3, 2\)"):
        crop_padded(images, 1, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected offsets in \[0, 2\], got \[0, 3\]"):
        crop_padded(images, 1, offsets + torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"expected offsets in \[0, 2\], got \[-1, 0\]"):
        crop_padded(images, 1, offsets - torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"expected which of shape \(2,\) and dtype torch.bool, got \(2,\)"):
        flip_horizontally(images, torch.zeros(2))
    with pytest.raises(ValueError, match="expected 3 means and deviations, got 1 and 1"):
        normalize(images, [0.5], [0.5])
    with pytest.raises(ValueError, match=r"expected images of dtype torch.uint8, got torch.float32"):
        normalize(images.float(), [0.5] * 3, [0.5] * 3)
