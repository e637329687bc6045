"""Noise to take for images."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = ("cat", "dog", "frog")


def noise_images(
    count: int, shape: tuple[int, int, int], generator: torch.Generator, num_classes: int = len(CLASSES)
) -> tuple[Tensor, Tensor]:
    """Images ``(count, *shape)`` uint8, and labels ``(count,)`` that take every class by turns."""
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % num_classes
