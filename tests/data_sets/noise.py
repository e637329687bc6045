"""Noise to take for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASSES = ("cat", "dog", "frog")
SIDES = [(20, 31), (31, 20), (16, 16), (9, 12), (40, 17)]  # width and height: wide, tall, exact, smaller, large


def noise_images(
    count: int, shape: tuple[int, int, int], generator: torch.Generator, num_classes: int = len(CLASSES)
) -> tuple[Tensor, Tensor]:
    """Images ``(count, *shape)`` uint8, and labels ``(count,)`` that take every class by turns."""
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % num_classes


def noise_pixels(index: int, width: int, height: int, channels: int = 3) -> np.ndarray:
    """``(height, width, channels)`` bytes, the same for the same index."""
    return np.random.RandomState(index).randint(0, 256, (height, width, channels), dtype=np.uint8)


def save_noise(path: Path, index: int, size: tuple[int, int] | None = None, **options: Any) -> None:
    """Saves a picture of noise, ``size`` wide and high; of one of five shapes by default."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise_pixels(index, *(size or SIDES[index % len(SIDES)]))).save(path, **options)


def truncate(path: Path) -> None:
    """Cuts off the last tenth of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])
