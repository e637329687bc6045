"""Tokens that do not write: padding of text models and of images of any size, class and register tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from tests.integrations.small_hosts import (
    FEW,
    IMAGE,
    SMALL,
    TEXT,
    bert,
    forward,
    gated,
    images,
    open_gates,
    record_writes,
    sentences,
    timm_model,
    transformers_model,
)
from tests.tolerances import assert_close

MODES = ("wrap", "parallel", "replace")


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def memories(model: nn.Module) -> list[Tensor]:
    return [module.workspace.memory.gamma.clone() for _, module in ait.workspaces(model)]


@pytest.mark.parametrize("mode", MODES)
def test_padding_never_writes(mode: Any) -> None:
    model = without_dropout(ait.insert_workspace(bert(), mode=mode, **FEW, write_dropout=0.0).train())
    inputs = sentences()
    other = copy.deepcopy(model)
    changed = {**inputs, "input_ids": inputs["input_ids"].where(inputs["attention_mask"] == 1, 7)}
    masks = record_writes(model)
    forward(model, inputs)
    forward(other, changed)
    assert torch.equal(masks[0], inputs["attention_mask"] == 0)
    for one, two in zip(memories(model), memories(other), strict=True):
        assert_close(one, two)
    forward(other, {"input_ids": changed["input_ids"]})
    forward(model, {"input_ids": inputs["input_ids"]})
    assert not torch.allclose(memories(model)[0], memories(other)[0]), "without a mask, they do"


def test_mask_is_taken_by_position_and_through_the_models_within() -> None:
    model = ait.insert_workspace(
        transformers_model("BertForSequenceClassification", "BertConfig", **SMALL, **TEXT), **FEW
    ).train()
    inputs = sentences()
    masks = record_writes(model)
    expected = inputs["attention_mask"] == 0
    model(*inputs.values())
    model.bert(*inputs.values())
    model.bert(**inputs)
    assert all(mask is not None and torch.equal(mask, expected) for mask in masks)
    model(inputs["input_ids"])
    assert masks[3] is None
    model(**inputs)
    assert gated(model)[0].mask.padding.current is None, "no mask outlives its forward pass"


def test_longer_mask_ends_with_the_tokens_of_now() -> None:
    model = ait.insert_workspace(bert(), **FEW).train()
    (first, *_) = gated(model)
    first.mask.padding.current = torch.tensor([[0, 0, 1, 0, 1]]).bool()
    assert torch.equal(first.mask.of(torch.zeros(1, 3, 32)), torch.tensor([[True, False, True]]))
    assert first.mask.of(torch.zeros(5, 32)) is None, "tokens without padding, by themselves"


def test_mask_of_another_shape_is_an_error_in_training_alone() -> None:
    model = ait.insert_workspace(bert(), **FEW)
    inputs = sentences()
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None, :].expand(3, 1, 9, 9).bool()
    forward(model, inputs)
    with pytest.raises(
        ValueError, match=r"expected a padding mask of shape \(3, 9\), one entry a token, got \(3, 1, 9, 9\)"
    ):
        forward(model.train(), inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_has_the_mask_of_its_own_forward_pass(reentrant: bool) -> None:
    model = without_dropout(ait.insert_workspace(bert(), **FEW).train())
    open_gates(model)
    reference = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    batches = [sentences(), sentences()]
    batches[1]["attention_mask"] = batches[1]["attention_mask"].flip(0)
    for host in (model, reference):
        with ait.balance_losses(host) as losses:
            total = sum(forward(host, batch).square().mean() for batch in batches)
        (total + sum(losses)).backward()
    gradients = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name].grad, parameter.grad, name)
    for one, two in zip(memories(model), memories(reference), strict=True):
        assert torch.equal(one, two)


def test_a_copy_does_not_share_the_mask() -> None:
    model = ait.insert_workspace(bert(), **FEW).train()
    other = copy.deepcopy(model)
    gated(model)[0].mask.padding.current = torch.ones(1, 1)
    paddings = {id(module.mask.padding) for module in gated(other)}
    assert len(paddings) == 1 and id(gated(model)[0].mask.padding) not in paddings
    assert gated(other)[0].mask.padding.current is None
    assert gated(copy.deepcopy(model))[0].mask.padding.current is None
    masks = record_writes(other)
    inputs = sentences()
    forward(other, inputs)
    assert torch.equal(masks[0], inputs["attention_mask"] == 0)


def test_vision_and_text_towers_do_not_mix_their_masks() -> None:
    config = dict(
        text_config=dict(**SMALL, **TEXT, pad_token_id=1, bos_token_id=1, eos_token_id=2),
        vision_config=dict(**SMALL, **IMAGE),
    )
    model = transformers_model("SiglipModel", "SiglipConfig", **config)
    ait.insert_workspace(model, **FEW).train()
    text, vision = record_writes(model, 0), record_writes(model, 2)
    inputs = sentences()
    model(**inputs, pixel_values=images())
    assert torch.equal(text[0], inputs["attention_mask"] == 0)
    assert vision == [None]


@pytest.mark.parametrize("mode", MODES)
def test_class_and_register_tokens_that_are_out_read_and_do_not_write(mode: Any) -> None:
    host = timm_model(reg_tokens=2)
    model = ait.insert_workspace(host, mode=mode, prefix_tokens="out", **FEW).train()
    masks = record_writes(model)
    x = images()
    model(x)
    expected = torch.arange(19) < 3
    assert torch.equal(masks[0], expected.expand(4, 19))
    before = memories(model)
    with torch.no_grad():
        model.cls_token.add_(1)
    other = ait.insert_workspace(timm_model(reg_tokens=2), mode=mode, prefix_tokens="in", **FEW).train()
    seen = record_writes(other)
    other(x)
    assert seen == [None]
    assert all(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))


def test_prefix_and_padding_add_up() -> None:
    model = ait.insert_workspace(bert(), prefix_tokens=1, **FEW).train()
    masks = record_writes(model)
    inputs = sentences()
    forward(model, inputs)
    assert torch.equal(masks[0], (inputs["attention_mask"] == 0) | (torch.arange(9) < 1))


@pytest.mark.parametrize("size", [17, 100])
def test_a_prefix_that_is_all_of_the_tokens_is_an_error(size: int) -> None:
    model = ait.insert_workspace(timm_model(), prefix_tokens=size, **FEW).train()
    before = memories(model)
    with pytest.raises(ValueError, match=rf"more than the {size} of prefix_tokens, got \(4, 17, 32\)"):
        model(images())
    assert all(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))


def test_a_prefix_of_maps_is_an_error() -> None:
    host = timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16))
    model = ait.insert_workspace(host, prefix_tokens=1, **FEW)
    with pytest.raises(ValueError, match=r"tokens \(B, N, E\), more than the 1 of prefix_tokens, got \(4, 8, 8, 8\)"):
        model.train()(images())


@pytest.mark.parametrize("as_dict", [False, True])
def test_padding_patches_of_naflex_never_write(as_dict: bool) -> None:
    model = timm_model("naflexvit_base_patch16_gap", embed_dim=32, depth=1, num_heads=2, num_classes=5)
    model = ait.insert_workspace(model, **FEW).train()
    prefix = model.num_prefix_tokens
    masks = record_writes(model)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    coordinates = torch.stack([rows, columns], -1).view(1, 9, 2).expand(3, 9, 2)
    valid = torch.arange(9) < torch.tensor([[9], [5], [7]])
    patches = torch.randn(3, 9, 16 * 16 * 3)
    inputs = dict(patches=patches, patch_coord=coordinates, patch_valid=valid)
    if as_dict:
        model(inputs)
    else:
        model(patches, coordinates, valid)
    assert prefix > 0
    assert torch.equal(masks[0], torch.cat([torch.zeros(3, prefix, dtype=torch.bool), ~valid], 1))
