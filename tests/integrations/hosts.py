"""Small hosts with random weights, by the library that builds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

OPTIONS = dict(num_slots=8, slot_dim=8, num_heads=2, top_k=4)


def timm_vit(**options: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **(sizes | options))


def timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=5)
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes)


def timm_eva() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return timm.create_model("eva02_tiny_patch14_224", **sizes)


def timm_convnext() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    model = models.VisionTransformer(**sizes)
    nn.init.normal_(model.heads.head.weight)  # zeros would hide everything behind them
    return model


def torchvision_swin() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    sizes = dict(patch_size=[2, 2], embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=5)
    return models.SwinTransformer(**sizes)


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config)


def hf_dinov2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Dinov2Config(**sizes, image_size=32, patch_size=8, num_labels=5)
    return transformers.Dinov2ForImageClassification(config)


def hf_bert(**options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    config = transformers.BertConfig(**(sizes | options), num_labels=5)
    return transformers.BertForSequenceClassification(config)


IMAGE_HOSTS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # maker, image size, blocks
    "timm ViT": (timm_vit, 32, 3),
    "timm Swin": (timm_swin, 32, 2),
    "timm EVA-02": (timm_eva, 28, 2),
    "timm ConvNeXt": (timm_convnext, 64, 4),
    "torchvision ViT": (torchvision_vit, 32, 2),
    "torchvision Swin": (torchvision_swin, 32, 2),
    "transformers ViT": (hf_vit, 32, 2),
    "transformers DINOv2": (hf_dinov2, 32, 2),
}


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    out = model(images)
    return out if isinstance(out, torch.Tensor) else out.logits


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Modules, hooks and state of a model, to be compared before and after."""
    modules = tuple((name, id(module), len(module._forward_hooks)) for name, module in model.named_modules())
    state = tuple((name, float(value.double().sum())) for name, value in model.state_dict().items())
    config = getattr(model, "config", None)
    return modules, state, str(config) if config is not None else ""
