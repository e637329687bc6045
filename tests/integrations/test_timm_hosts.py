"""What timm offers on its own models goes on working on those with workspaces in them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from tests.integrations.small_hosts import FEW, gated, images, open_gates, timm_model
from tests.tolerances import assert_close

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(
    not hasattr(timm.models.VisionTransformer, "forward_intermediates"), reason="this timm has no forward_intermediates"
)

MODES = ("wrap", "parallel")
HOSTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "swin_tiny_patch4_window7_224": dict(img_size=32, depths=(1, 1), num_heads=(2, 2), embed_dim=16, window_size=4),
    "eva02_tiny_patch14_224": dict(img_size=28, embed_dim=32, depth=2, num_heads=2),
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)),
}


def host(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    model = timm_model(name, **{**HOSTS[name], **arguments})
    for parameter in model.parameters():  # some are 0 at first, and would hide what comes before them
        nn.init.normal_(parameter, std=0.3)
    return model


def pixels(name: str) -> Tensor:
    return images(28 if name.startswith("eva") else 32)


def with_open_gates(model: nn.Module, **arguments: Any) -> nn.Module:
    ait.insert_workspace(model, **{**FEW, **arguments})
    open_gates(model)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HOSTS)
def test_forward_intermediates_are_the_hosts_own_until_a_gate_opens(name: str, mode: Any) -> None:
    model, x = host(name), pixels(name)
    final, expected = model.forward_intermediates(x)
    ait.insert_workspace(model, mode=mode, **FEW)
    same, maps = model.forward_intermediates(x)
    assert torch.equal(same, final) and all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    open_gates(model)
    other, maps = model.forward_intermediates(x)
    assert torch.equal(other, model.forward_features(x)) and not torch.equal(other, final)
    assert not torch.equal(maps[-1], expected[-1])
    ait.remove_workspace(model)
    assert torch.equal(model.forward_intermediates(x)[0], final)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_features_only_takes_workspaces_and_gives_maps_of_the_whole_model(name: str) -> None:
    x = pixels(name)
    backbone = host(name, features_only=True, out_indices=(0, 1))
    expected = backbone(x)
    names = set(backbone.state_dict())
    ait.insert_workspace(backbone, **FEW)
    assert len(ait.workspaces(backbone)) == 2 and names < set(backbone.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), expected, strict=True))
    open_gates(backbone)
    opened = backbone(x)
    assert [each.shape for each in opened] == [each.shape for each in expected]
    assert not any(torch.equal(a, b) for a, b in zip(opened, expected, strict=True))
    (sum(each.square().mean() for each in backbone.train()(x)) + ait.balance_loss(backbone)).backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for m in gated(backbone) for parameter in m.parameters()
    )


@pytest.mark.parametrize("where", ["mlp_layer", "block_fn"])
def test_features_only_of_models_that_are_built_with_the_layer(where: str) -> None:
    layers = pytest.importorskip("ait.integrations.timm_layers")
    layer = layers.WorkspaceMlp if where == "mlp_layer" else layers.WorkspaceBlock
    options = {option: value for option, value in FEW.items() if option != "num_heads"}
    arguments = {where: functools.partial(layer, **options)}
    backbone, x = timm_model(**arguments, features_only=True, out_indices=(0, 1)), images()
    whole = timm_model(**arguments)
    whole.load_state_dict(backbone.model.state_dict(), strict=False)
    expected = whole.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), expected, strict=True))


def test_a_new_classifier_leaves_workspaces_and_their_state() -> None:
    model, x = with_open_gates(host()), images()
    model.train()(x)
    before = {name: value.clone() for name, value in ait.workspace_state_dict(model).items()}
    features = model.eval().forward_features(x)
    model.reset_classifier(7)
    assert model(x).shape == (4, 7) and torch.equal(model.forward_features(x), features)
    assert all(torch.equal(value, before[name]) for name, value in ait.workspace_state_dict(model).items())
    ait.freeze_backbone(model)
    assert all(parameter.requires_grad for parameter in model.head.parameters())
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))


def test_pruned_blocks_take_their_workspaces_with_them() -> None:
    model, x = with_open_gates(host()), images()
    expected = model.forward_intermediates(x, [0], intermediates_only=True)[0]
    model.prune_intermediate_layers([0])
    assert [name for name, _ in ait.workspaces(model)] == ["blocks.0.global_workspace"]
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[0], expected)
    ait.remove_workspace(model)


# EVA is left out, since its checkpointing fails by itself in some releases of timm with later ones of torch.
@pytest.mark.parametrize("name", [name for name in HOSTS if not name.startswith("eva")])
def test_checkpointing_changes_no_gradient_and_no_memory(name: str) -> None:
    model, x = with_open_gates(host(name)).train(), pixels(name)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        torch.manual_seed(1)
        (each(x).square().mean() + ait.balance_loss(each)).backward()
    for (key, parameter), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and theirs.grad is not None, key
        assert_close(theirs.grad, parameter.grad, key)
    for module, theirs in zip(gated(model), gated(other), strict=True):
        assert torch.equal(module.workspace.memory.gamma, theirs.workspace.memory.gamma)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_layer_decay_gives_a_workspace_the_rate_of_its_block(name: str) -> None:
    factory = pytest.importorskip("timm.optim")
    model = ait.insert_workspace(host(name), **FEW)
    optimizer = factory.create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len({scale[id(p)] for p in model.parameters()}) > 2
    for path, module in ait.workspaces(model):
        block = model.get_submodule(path.rpartition(".")[0])
        (expected,) = {scale[id(p)] for p in block.mlp.parameters()}
        assert {scale[id(p)] for p in module.parameters()} == {expected}, path
