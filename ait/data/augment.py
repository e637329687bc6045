"""Augmentation and normalisation of whole batches of images.

What is drawn at random and what is then done with it are apart, so that each can be tested against the image by image
evaluation, and a batch can be done again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_padded(images: Tensor, padding: int, offsets: Tensor) -> Tensor:
    """Pads every side with zeros, and cuts a window of the old size out of each image at its own offset.

    Args:
        images: ``(B, C, H, W)``, any dtype.
        padding: pixels on each side.
        offsets: ``(B, 2)`` int64, row and column of the window, each in ``[0, 2 * padding]``; ``padding`` leaves an
            image where it was.

    Returns:
        ``(B, C, H, W)``.

    Raises:
        ValueError: ``offsets`` is not as above.
    """
    batch, channels, height, width = images.shape
    if offsets.shape != (batch, 2):
        raise ValueError(f"crop_padded: expected offsets of shape ({batch}, 2), got {tuple(offsets.shape)}")
    if batch and (int(offsets.min()) < 0 or int(offsets.max()) > 2 * padding):
        raise ValueError(
            f"crop_padded: expected offsets in [0, {2 * padding}], got [{int(offsets.min())}, {int(offsets.max())}]"
        )
    padded = F.pad(images, [padding] * 4)
    device = images.device
    offsets = offsets.to(device)
    rows = offsets[:, 0, None] + torch.arange(height, device=device)
    columns = offsets[:, 1, None] + torch.arange(width, device=device)
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip_horizontally(images: Tensor, which: Tensor) -> Tensor:
    """Mirrors the images ``(B, C, H, W)`` where ``which (B,)`` bool is True, left to right."""
    if which.shape != images.shape[:1] or which.dtype != torch.bool:
        raise ValueError(
            f"flip_horizontally: expected which of shape ({len(images)},) and dtype torch.bool, "
            f"got {tuple(which.shape)}, {which.dtype}"
        )
    return torch.where(which.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop(images: Tensor, padding: int, generator: torch.Generator, probability: float = 1.0) -> Tensor:
    """:func:`crop_padded` at offsets that ``generator`` draws, uniformly and apart for every image.

    Args:
        images: ``(B, C, H, W)``.
        padding: pixels on each side.
        generator: what draws.
        probability: with which an image is cropped; otherwise it stays where it was.
    """
    offsets = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=generator, device=generator.device)
    if probability < 1:
        stays = torch.rand(len(images), generator=generator, device=generator.device) >= probability
        offsets[stays] = padding
    return crop_padded(images, padding, offsets)


def random_horizontal_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """:func:`flip_horizontally` of each image with probability 1/2, drawn from ``generator``."""
    which = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return flip_horizontally(images, which)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images / 255 - mean) / std`` in float32, channel by channel.

    Args:
        images: ``(B, C, H, W)`` uint8.
        mean: ``C`` numbers, of images scaled to [0, 1].
        std: ``C`` numbers above 0.

    Raises:
        ValueError: dtype or number of channels are not as above.
    """
    channels = images.shape[1]
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize: expected images of dtype torch.uint8, got {images.dtype}")
    if not len(mean) == len(std) == channels:
        raise ValueError(f"normalize: expected {channels} means and deviations, got {len(mean)} and {len(std)}")
    mean_C11 = torch.tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    return images.float().div_(255).sub_(mean_C11).div_(std_C11)
