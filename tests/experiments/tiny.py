"""Data and options of runs that take a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from train import Config, train

from ait.data import write_sheets
from tests.data_sets.noise import noise_images

# 32 x 32 in patches of 16: four tokens; 36 training images in batches of 16: two steps an epoch.
TINY_MODEL = ("depth=1", "embed_dim=16", "head_dim=8", "hidden_dim=16")
TINY_WORKSPACE = ("num_slots=4", "slot_dim=4", "workspace_heads=2", "top_k=3")


def write_tiny_cifar(folder: Path, num_classes: int = 10) -> Path:
    """Contact sheets that pass for CIFAR-10: 40 training and 20 test images of noise."""
    generator = torch.Generator().manual_seed(0)
    train_set, test_set = (noise_images(count, (3, 32, 32), generator, num_classes) for count in (40, 20))
    write_sheets(folder, train_set, test_set, [f"class {index}" for index in range(num_classes)], grid=(5, 5))
    return folder


def tiny_config(data_dir: Path, out: Path, model: str = "ait_tiny", **changes: Any) -> Config:
    options = TINY_MODEL + (TINY_WORKSPACE if model.startswith("ait") else ())
    config = Config(
        model=model,
        data="cifar10",
        data_dir=data_dir,
        out=out,
        options=options,
        patch_size=16,
        epochs=2,
        batch_size=16,
        lr=1e-3,
        warmup_epochs=0.5,
    )
    return dataclasses.replace(config, **changes)


def run_quietly(config: Config) -> dict[str, Any]:
    return train(config, progress=False)
