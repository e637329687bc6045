"""A small set of noise images, as tensors and as contact sheets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data_sets.noise import CLASSES, noise_images


@pytest.fixture
def sheets(tmp_path: Path) -> Path:
    """A fresh folder: 23 training and 7 test images of 3 x 6 x 5 on sheets of 2 x 4."""
    pytest.importorskip("PIL")
    from ait.data import write_sheets

    folder = tmp_path / "sheets"
    generator = torch.Generator().manual_seed(0)
    train, test = (noise_images(count, (3, 6, 5), generator) for count in (23, 7))
    write_sheets(folder, train, test, CLASSES, grid=(2, 4))
    return folder
