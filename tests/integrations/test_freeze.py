"""freeze_backbone: what learns, what stands still, and how it is undone; with LoRA of the peft package, too."""

from __future__ import annotations

import copy

import pytest
import torch

import ait
from tests.integrations.hosts import IMAGE_HOSTS, OPTIONS, fingerprint, logits, timm_vit

HEAD_NAMES = ("head", "classifier")


@pytest.mark.parametrize("name", IMAGE_HOSTS)
def test_only_workspaces_and_classifier_learn(name):
    make, size, _ = IMAGE_HOSTS[name]
    model = ait.insert_workspace(make(), **OPTIONS).train()
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    ait.freeze_backbone(model)
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    inserted = {key for key in before if "global_workspace" in key}
    assert inserted <= learning and len(learning) > len(inserted)
    assert all(part.startswith(HEAD_NAMES) for part in learning - inserted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (logits(model, torch.randn(2, 3, size, size)).square().sum() + ait.balance_loss(model)).backward()
        optimizer.step()
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (key in learning), key
    ait.freeze_backbone(model, frozen=False)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before


def test_head_can_be_frozen_or_named():
    model = ait.insert_workspace(timm_vit(), **OPTIONS)
    ait.freeze_backbone(model, head=False)
    assert not any(p.requires_grad for p in model.head.parameters())
    ait.freeze_backbone(model, head="norm")
    assert all(p.requires_grad for p in model.norm.parameters())
    assert not any(p.requires_grad for p in model.head.parameters())


@pytest.mark.parametrize("order", ["memory first", "backbone first"])
def test_a_frozen_memory_stays_frozen(order):
    model = ait.insert_workspace(timm_vit(), **OPTIONS)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    steps = [ait.freeze_memory, ait.freeze_backbone]
    for step in steps if order == "memory first" else reversed(steps):
        step(model)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".writer." in key)
    assert all(p.requires_grad for key, p in model.named_parameters() if ".reader." in key)
    ait.freeze_memory(model, frozen=False)
    assert all(p.requires_grad for key, p in model.named_parameters() if ".writer." in key)
    ait.freeze_backbone(model, frozen=False)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before


def test_it_works_on_models_of_this_package():
    model = ait.create_model("ait_tiny", img_size=8, patch_size=4, num_classes=3)
    ait.freeze_backbone(model)
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    assert any(".workspace." in key for key in learning) and any(key.startswith("head") for key in learning)
    assert not any(".fc1." in key or ".attn." in key for key in learning)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (timm_vit, {}, "without one"),
        (lambda: ait.insert_workspace(timm_vit(), **OPTIONS), dict(frozen=False), "froze"),
        (lambda: ait.insert_workspace(timm_vit(), **OPTIONS), dict(frozen="yes"), "True or False"),
        (lambda: ait.insert_workspace(timm_vit(), **OPTIONS), dict(head="tail"), "tail"),
        (lambda: ait.insert_workspace(timm_vit(num_classes=0), **OPTIONS), {}, "classifier"),
    ],
    ids=["no workspace", "not frozen", "no bool", "no such head", "no head"],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(make, arguments, message):
    model = make()
    before = fingerprint(model), {key: p.requires_grad for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        ait.freeze_backbone(model, **arguments)
    assert (fingerprint(model), {key: p.requires_grad for key, p in model.named_parameters()}) == before


def test_lora_workspaces_and_classifier_learn_together_are_saved_and_merged(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    host = timm_vit()
    bare = copy.deepcopy(host)
    ait.insert_workspace(host, **OPTIONS)
    model = peft.get_peft_model(host, peft.LoraConfig(r=2, target_modules=["attn.qkv", "attn.proj"]))
    ait.freeze_backbone(model)
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    kinds = ("lora_", "global_workspace", ".head.")
    assert all(any(kind in key for kind in kinds) for key in learning)
    assert all(any(kind in key for key in learning) for kind in kinds)
    memory = ait.workspaces(model)[0][1].workspace.memory.gamma.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        optimizer.zero_grad()
        (model.train()(images).square().mean() + ait.balance_loss(model)).backward()
        optimizer.step()
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (key in learning), key
    assert not torch.equal(ait.workspaces(model)[0][1].workspace.memory.gamma, memory)
    expected = model.eval()(images)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(ait.workspace_state_dict(model), tmp_path / "workspace.pt")
    bare.head.load_state_dict(host.head.state_dict())
    again = peft.PeftModel.from_pretrained(ait.load_workspace(bare, tmp_path / "workspace.pt"), tmp_path / "adapter")
    assert torch.equal(again.eval()(images), expected)
    merged = model.merge_and_unload()
    assert not any("lora_" in key for key, _ in merged.named_parameters())
    torch.testing.assert_close(merged.eval()(images), expected, rtol=1e-4, atol=1e-5)
