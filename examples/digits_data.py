"""The training images that the examples share."""

from __future__ import annotations

import torch

from ait.data import digits


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits: images ``(B, 1, 8, 8)`` in [0, 1], labels ``(B,)``."""
    train, _ = digits()
    return train.images.float() / 255, train.labels
