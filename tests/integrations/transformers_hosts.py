"""Small transformers models that every release since 4.40 has. No test module: older releases run with it, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations.small_hosts import IMAGE, SMALL, TEXT, images, sentences

THREE = {**SMALL, "num_hidden_layers": 3}
DISTIL = dict(dim=32, n_layers=3, n_heads=2, hidden_dim=64, **TEXT)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

# Name: (class, class of its config, arguments).
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", THREE | IMAGE),
    "DeiT": ("DeiTModel", "DeiTConfig", THREE | IMAGE),
    "DINOv2": ("Dinov2Model", "Dinov2Config", THREE | IMAGE | dict(mlp_ratio=2)),
    "BEiT": ("BeitModel", "BeitConfig", THREE | IMAGE),
    "CLIP's vision": ("CLIPVisionModel", "CLIPVisionConfig", THREE | IMAGE),
    "BERT": ("BertForSequenceClassification", "BertConfig", THREE | TEXT),
    "RoBERTa": ("RobertaModel", "RobertaConfig", THREE | TEXT),
    "ELECTRA": ("ElectraModel", "ElectraConfig", THREE | TEXT),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", DISTIL),
}
TEXT_MODELS = ("BERT", "RoBERTa", "ELECTRA", "DistilBERT")


def transformers() -> Any:
    return pytest.importorskip("transformers")


def build(name: str) -> nn.Module:
    library = transformers()
    if name == "CLIP":
        parts = dict(text_config=THREE | TEXT | SPECIAL, vision_config=THREE | IMAGE)
        return library.CLIPModel(library.CLIPConfig(**parts)).eval()
    model, config, arguments = CLASSES[name]
    return getattr(library, model)(getattr(library, config)(**arguments)).eval()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    return sentences() if name in TEXT_MODELS else dict(pixel_values=images())
