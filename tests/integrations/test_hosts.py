"""Which hosts are found, and where in them a workspace goes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ait
from tests.integrations.small_hosts import (
    FEW,
    IMAGE,
    SMALL,
    TEXT,
    bert,
    forward,
    images,
    open_gates,
    sentences,
    timm_model,
    transformers_model,
)


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).eval()


def torchvision_swin() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [2, 2], num_classes=5).eval()


def hugging_face(model: str, config: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: transformers_model(model, config, **arguments)


SWIN = dict(depths=(1, 1), num_heads=(2, 2), embed_dim=16, window_size=4)
VISION = SMALL | IMAGE
GLU = dict(mlp_ratio=2, use_swiglu_ffn=True)
DISTIL = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64)
HF_SWIN = IMAGE | dict(patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)

# Name: (host, blocks, widths of the first and last, inputs).
HOSTS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int], Callable[[], Any]]] = {
    "timm vit": (timm_model, 2, (32, 32), images),
    "timm swin": (lambda: timm_model("swin_tiny_patch4_window7_224", img_size=32, **SWIN), 2, (16, 32), images),
    "timm swinv2": (lambda: timm_model("swinv2_tiny_window8_256", img_size=32, **SWIN), 2, (16, 32), images),
    "timm deit": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2),
        2,
        (32, 32),
        images,
    ),
    "timm eva": (
        lambda: timm_model("eva02_tiny_patch14_224", img_size=28, embed_dim=32, depth=2, num_heads=2),
        2,
        (32, 32),
        lambda: images(28),
    ),
    "timm beit": (
        lambda: timm_model("beit_base_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2),
        2,
        (32, 32),
        images,
    ),
    "timm cait": (
        lambda: timm_model("cait_xxs24_224", img_size=32, embed_dim=32, depth=2, num_heads=2),
        2,
        (32, 32),
        images,
    ),
    "timm convnext, channels last": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), conv_mlp=False),
        4,
        (8, 16),
        images,
    ),
    "timm convnext, channels first": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), conv_mlp=True),
        4,
        (8, 16),
        images,
    ),
    "timm pvt": (
        lambda: timm_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 1, 1, 1)),
        4,
        (8, 16),
        images,
    ),
    "torchvision vit": (torchvision_vit, 2, (32, 32), images),
    "torchvision swin": (torchvision_swin, 2, (16, 32), images),
    "ViT": (hugging_face("ViTForImageClassification", "ViTConfig", **VISION), 2, (32, 32), images),
    "DeiT": (hugging_face("DeiTModel", "DeiTConfig", **VISION), 2, (32, 32), images),
    "DINOv2": (hugging_face("Dinov2Model", "Dinov2Config", **VISION, mlp_ratio=2), 2, (32, 32), images),
    "DINOv2, SwiGLU": (hugging_face("Dinov2Model", "Dinov2Config", **VISION, **GLU), 2, (32, 32), images),
    "BEiT": (hugging_face("BeitModel", "BeitConfig", **VISION), 2, (32, 32), images),
    "Swin": (hugging_face("SwinModel", "SwinConfig", **HF_SWIN), 2, (16, 32), images),
    "CLIP's vision": (hugging_face("CLIPVisionModel", "CLIPVisionConfig", **VISION), 2, (32, 32), images),
    "SigLIP's vision": (hugging_face("SiglipVisionModel", "SiglipVisionConfig", **VISION), 2, (32, 32), images),
    "BERT": (bert, 2, (32, 32), sentences),
    "RoBERTa": (hugging_face("RobertaModel", "RobertaConfig", **SMALL, **TEXT), 2, (32, 32), sentences),
    "ELECTRA": (hugging_face("ElectraModel", "ElectraConfig", **SMALL, **TEXT), 2, (32, 32), sentences),
    "DistilBERT": (hugging_face("DistilBertModel", "DistilBertConfig", **DISTIL, **TEXT), 2, (32, 32), sentences),
    "ALBERT": (
        hugging_face("AlbertModel", "AlbertConfig", **SMALL, **TEXT, embedding_size=16),
        1,
        (32, 32),
        sentences,
    ),
}


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
@pytest.mark.parametrize("name", HOSTS)
def test_insertion_changes_no_bit_of_the_output_and_an_open_gate_does(name: str, mode: Any) -> None:
    build, blocks, widths, make_inputs = HOSTS[name]
    model, inputs = build(), make_inputs()
    for parameter in model.parameters():  # some are 0 at first, and would hide what comes before them
        torch.nn.init.normal_(parameter, std=0.3)
    expected = forward(model, inputs)
    names = set(model.state_dict())

    assert ait.insert_workspace(model, mode=mode, **FEW) is model
    found = [module for _, module in ait.workspaces(model)]
    assert len(found) == blocks
    assert (found[0].workspace.dim, found[-1].workspace.dim) == widths
    assert names < set(model.state_dict()), "the host's own names stay"
    assert torch.equal(forward(model, inputs), expected)

    open_gates(model)
    assert not torch.equal(forward(model, inputs), expected)
    ait.remove_workspace(model)
    assert set(model.state_dict()) == names
    assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
@pytest.mark.parametrize("name", HOSTS)
def test_every_added_parameter_has_a_gradient_from_the_second_step_on(name: str, mode: Any) -> None:
    build, _, _, make_inputs = HOSTS[name]
    if (name, mode) == ("ALBERT", "replace"):
        pytest.skip("its MLP is no single module")
    model, inputs = build(), make_inputs()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    own = {id(parameter) for parameter in model.parameters()}
    prefix_tokens = "out" if name in ("timm vit", "ViT") else "in"
    ait.insert_workspace(model, mode=mode, prefix_tokens=prefix_tokens, **FEW).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        output = forward(model, inputs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        ((output * weights).mean() + ait.balance_loss(model)).backward()
        added = {key: p.grad for key, p in model.named_parameters() if id(p) not in own}
        assert added
        if step == 0:
            assert all(grad is not None and grad.any() for key, grad in added.items() if key.endswith("gate"))
        else:
            assert [key for key, grad in added.items() if grad is None or not grad.any()] == [], step
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "ALBERT"])
def test_replacing_leaves_dropout_and_residual_of_the_block(name: str) -> None:
    build, blocks, _, make_inputs = HOSTS[name]
    model, inputs = build(), make_inputs()
    ait.insert_workspace(model, mode="replace", **FEW)
    found = [module for _, module in ait.workspaces(model)]
    assert len(found) == blocks
    with torch.no_grad():
        for module in found:  # a layer whose output is 0 leaves the block its residual alone
            layer = module.global_workspace
            for parameter in (layer.norm.weight, layer.norm.bias, *layer.workspace.reader.parameters()):
                parameter.zero_()
    silent = forward(model, inputs)

    reference = build()
    reference.load_state_dict(model.state_dict(), strict=False)
    for name, module in model.named_modules():
        if name.endswith(("mlp", "ffn", "intermediate")) and module in found:
            whole = name.rpartition(".")[2] != "intermediate"
            target = name if whole else f"{name.removesuffix('intermediate')}output.dense"
            reference.get_submodule(target).register_forward_hook(lambda _, args, y: torch.zeros_like(y))
    assert torch.equal(silent, forward(reference, inputs))


def test_order_of_the_numbers_is_that_in_which_blocks_run() -> None:
    for build, _, _, make_inputs in HOSTS.values():
        model = build()
        ait.insert_workspace(model, **FEW)
        ran: list[int] = []
        for _, module in ait.workspaces(model):
            number = module.insertion.layer
            module.register_forward_hook(lambda *_, number=number, ran=ran: ran.append(number))
        forward(model, make_inputs())
        assert list(dict.fromkeys(ran)) == list(range(len(ait.workspaces(model))))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2, 3]), ([-1, 0], [0, 3]), (range(2), [0, 1]), (slice(1, None, 2), [1, 3]), (slice(-1, None), [3])],
)
def test_layers_are_chosen_by_number_or_slice(layers: Any, expected: list[int]) -> None:
    model = ait.insert_workspace(timm_model(depth=4), layers, **FEW)
    assert [name for name, _ in ait.workspaces(model)] == [f"blocks.{i}.global_workspace" for i in expected]


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (timm_model, 1),
        (lambda: timm_model(reg_tokens=3), 4),
        (lambda: timm_model(class_token=False, global_pool="avg"), 0),
        (HOSTS["timm deit"][0], 2),
        (HOSTS["timm cait"][0], 0),  # its class token comes later
        (torchvision_vit, 1),
        (HOSTS["ViT"][0], 1),
        (HOSTS["DeiT"][0], 2),
        (HOSTS["CLIP's vision"][0], 1),
        (hugging_face("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **VISION, mlp_ratio=2), 5),
    ],
)
def test_class_and_register_tokens_are_counted(build: Callable[[], nn.Module], count: int) -> None:
    model = ait.insert_workspace(build(), prefix_tokens="out", **FEW)
    assert {module.mask.prefix_tokens for _, module in ait.workspaces(model)} == {count}


def test_import_and_insertion_need_no_other_library() -> None:
    code = """
import sys
import ait
host = ait.create_model("vit_small", img_size=8, patch_size=4, num_classes=2, embed_dim=64)
ait.insert_workspace(host)
assert len(ait.workspaces(host)) == 2
print([name for name in ("timm", "torchvision", "transformers", "safetensors") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
