from __future__ import annotations

import pytest
import torch

import ait
from ait.models import AssociativeTransformer, VisionTransformer

NAMES = [f"{family}_{size}" for family in ("ait", "vit") for size in ("base", "medium", "small", "tiny")]


def test_the_names() -> None:
    assert [name for name in ait.list_models() if name.startswith(("ait_", "vit_"))] == NAMES


def test_filter_is_a_shell_pattern() -> None:
    assert ait.list_models("ait_*") == NAMES[:4]
    assert ait.list_models("vit_[bt]*") == ["vit_base", "vit_tiny"]
    assert ait.list_models("resnet*") == []


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_class_and_the_sizes_of_its_name(name: str) -> None:
    model = ait.create_model(name, device="meta", num_classes=100)
    family, size = name.split("_")
    assert type(model) is {"ait": AssociativeTransformer, "vit": VisionTransformer}[family]
    width, heads, depth = {"tiny": (128, 4, 3), "small": (768, 12, 2), "medium": (768, 12, 6), "base": (768, 12, 12)}[
        size
    ]
    assert (model.embed_dim, len(model.blocks), model.num_classes) == (width, depth, 100)
    assert {(block.attn.num_heads, block.mlp.fc1.out_features) for block in model.blocks} == {(heads, 4 * width)}


def test_image_arguments_reach_the_model() -> None:
    model = ait.create_model("vit_tiny", img_size=(8, 12), patch_size=2, in_chans=1, num_classes=7)
    assert model(torch.zeros(2, 1, 8, 12)).shape == (2, 7)


def test_options_go_over_those_that_make_the_size() -> None:
    model = ait.create_model("ait_tiny", depth=1, num_slots=5, hidden_dim=24, question_dim=11)
    assert len(model.blocks) == 1
    assert model.blocks[0].mlp.workspace.memory.gamma.shape == (5, 16)
    assert model.blocks[0].mlp.fc1.out_features == 24
    assert model.question_dim == 11


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ait_smal", r"no model named 'ait_smal'; did you mean 'ait_small'"),
        ("AiT-Tiny", r"no model named 'AiT-Tiny'; did you mean 'ait_tiny'"),
        ("resnet50", r"no model named 'resnet50'; There are .*'ait_base', 'ait_medium'"),
        (None, r"no model named None; There are "),
        (["ait_tiny"], r"no model named \['ait_tiny'\]; "),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="create_model: " + message):
        ait.create_model(name)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("ait_tiny", "num_slot", r"ait_tiny has no option 'num_slot'; did you mean 'num_slots'"),
        ("ait_tiny", "num_heads", r"ait_tiny has no option 'num_heads'; .*There are .*'workspace_heads'"),
        ("vit_tiny", "num_slots", r"vit_tiny has no option 'num_slots'"),
        ("vit_tiny", "weights", r"vit_tiny has no option 'weights'; .*[Tt]here are .*'embed_dim'"),
        ("vit_tiny", "make_block", r"vit_tiny has no option 'make_block'"),
        ("vit_tiny", "shell", r"vit_tiny has no option 'shell'"),
    ],
)
def test_an_unknown_option_is_refused_with_the_closest_ones(name: str, option: str, message: str) -> None:
    with pytest.raises(TypeError, match="create_model: " + message):
        ait.create_model(name, **{option: None})


def test_a_refused_value_is_named_by_what_refuses_it() -> None:
    with pytest.raises(ValueError, match="top_k"):
        ait.create_model("ait_tiny", top_k=0)
    with pytest.raises(ValueError, match="reader"):
        ait.create_model("ait_tiny", reader="mlp")
