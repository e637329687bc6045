"""Small hosts with random weights, and what the tests do with each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from ait.integrations import InsertedWorkspace

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
IMAGE = dict(image_size=32, patch_size=8)
TEXT = dict(vocab_size=50, max_position_embeddings=40)
FEW = dict(num_slots=4, slot_dim=8, num_heads=2, top_k=4)  # options of a small workspace


def timm_model(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2) if name.startswith("vit") else {}
    return timm.create_model(name, **{**small, "num_classes": 5, **arguments}).eval()


def transformers_model(model: str, config: str, **arguments: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()


def bert(**arguments: Any) -> nn.Module:
    return transformers_model("BertModel", "BertConfig", **SMALL, **TEXT, **arguments)


def images(size: int = 32) -> Tensor:
    return torch.randn(4, 3, size, size)


def sentences() -> dict[str, Tensor]:
    """Three sentences of 9, 5 and 7 tokens."""
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]])
    return dict(input_ids=torch.randint(3, 50, (3, 9)), attention_mask=mask.long())


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """The first output of ``model``."""
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output[0]


def gated(model: nn.Module) -> list[InsertedWorkspace]:
    return [module for _, module in ait.workspaces(model) if isinstance(module, InsertedWorkspace)]


def open_gates(model: nn.Module, value: float = 0.5) -> None:
    with torch.no_grad():
        for module in gated(model):
            module.gate.fill_(value)


def record_writes(model: nn.Module, layer: int = 0) -> list[Tensor | None]:
    """A list that gains the mask with which a layer's workspace is called, one entry a forward pass."""
    module = ait.workspaces(model)[layer][1]
    masks: list[Tensor | None] = []
    module.workspace.register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    return masks


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All by which one could tell that a model was changed."""
    structure = [
        (name, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = getattr(model, "config", None)
    return structure, learns, None if config is None else str(config)


def assert_unchanged(model: nn.Module, change: Callable[[], Any]) -> None:
    """Asserts that ``change``, which may raise, leaves a model as it was, by what it consists of and by its bits."""
    before = snapshot(model)
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    change()
    assert snapshot(model) == before
    after = model.state_dict()
    for name, value in state.items():
        assert torch.equal(after[name], value), name
