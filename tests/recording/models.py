"""Small models to record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ait

IMAGES, SIDE, PATCH = 4, 16, 4  # 16 tokens an image


def small_model(**options: Any) -> ait.AssociativeTransformer:
    """Two blocks, 4 slots, 2 heads of the write; the same weights every time."""
    torch.manual_seed(1)
    arguments: dict[str, Any] = dict(
        depth=2, embed_dim=16, head_dim=8, img_size=SIDE, patch_size=PATCH, num_slots=4, slot_dim=6, workspace_heads=2
    )
    return ait.AssociativeTransformer(**(arguments | dict(top_k_ratio=1 / 8) | options))


def some_images(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def all_states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + len(module._backward_hooks)
        + len(module._backward_pre_hooks)
        for module in model.modules()
    )
