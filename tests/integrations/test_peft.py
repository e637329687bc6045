"""LoRA of the peft package beside workspaces: both learn, both are in the adapter's file, and merging keeps both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from tests.integrations.hosts import OPTIONS, hf_bert, hf_vit, timm_vit
from tests.tolerances import assert_close

peft = pytest.importorskip("peft")

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])}

HOSTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str], str]] = {
    "timm ViT": (timm_vit, {"x": IMAGES}, ["attn.qkv", "attn.proj"], "head"),
    "transformers ViT": (hf_vit, {"pixel_values": IMAGES}, ["q_proj", "v_proj"], "classifier"),
    "transformers BERT": (hf_bert, TEXT, ["query", "value"], "classifier"),
}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(*inputs.values()) if "x" in inputs else model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def wrap(host: nn.Module, targets: list[str], saved: list[str] | None) -> nn.Module:
    return peft.get_peft_model(host, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved))


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (run(model, inputs).square().mean() + ait.balance_loss(model)).backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
@pytest.mark.parametrize("name", HOSTS)
def test_workspaces_among_modules_to_save_learn_are_saved_and_merged(name: str, mode: Any, tmp_path: Path) -> None:
    make, inputs, targets, head = HOSTS[name]
    torch.manual_seed(0)
    host = ait.insert_workspace(make(), mode=mode, **OPTIONS)
    fresh = copy.deepcopy(host)
    model = wrap(host, targets, ["global_workspace", head])
    names = [key for key, _ in ait.workspaces(model)]
    assert names and all("global_workspace.modules_to_save.default" in key or mode == "replace" for key in names)
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    memories = [w.workspace.memory.gamma.clone() for _, w in ait.workspaces(model)]
    train(model, inputs)
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (key in learning), key
    assert any("lora_" in key for key in learning) and any("writer.key" in key for key in learning)
    for before, (_, module) in zip(memories, ait.workspaces(model), strict=True):
        assert not torch.equal(module.workspace.memory.gamma, before), "the memory of the copy is written"

    expected = run(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(run(again.eval(), inputs), expected)
    merged = model.merge_and_unload()
    assert not any(part in key for key, _ in merged.named_parameters() for part in ("lora_", "modules_to_save"))
    assert_close(run(merged.eval(), inputs).detach(), expected.detach(), name)
    bare = ait.insert_workspace(make(), mode=mode, **OPTIONS)
    assert ait.workspace_state_dict(merged).keys() == ait.workspace_state_dict(bare).keys()


def test_padding_does_not_write_into_the_copy_that_peft_trains() -> None:
    make, inputs, targets, head = HOSTS["transformers BERT"]
    results = []
    for padding in (7, 9):
        torch.manual_seed(0)
        model = wrap(ait.insert_workspace(make(), **OPTIONS), targets, ["global_workspace", head]).train()
        ids = torch.where(inputs["attention_mask"] == 0, padding, inputs["input_ids"])
        torch.manual_seed(1)
        model(input_ids=ids, attention_mask=inputs["attention_mask"])
        results.append([w.workspace.memory.gamma for _, w in ait.workspaces(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_with_adapters_disabled_the_host_computes_what_it_did() -> None:
    make, inputs, targets, head = HOSTS["timm ViT"]
    torch.manual_seed(0)
    host = make().eval()
    expected = run(host, inputs)
    model = wrap(ait.insert_workspace(host, **OPTIONS), targets, ["global_workspace", head])
    train(model, inputs)
    with model.eval().disable_adapter():
        assert torch.equal(run(model, inputs), expected)
    assert not torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("saved", [None, ["head"], ["global_workspace", "head"]])
def test_freeze_backbone_after_peft_and_its_undoing(saved: list[str] | None) -> None:
    make, inputs, targets, _ = HOSTS["timm ViT"]
    model = wrap(ait.insert_workspace(make(), **OPTIONS), targets, saved)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    ait.freeze_backbone(model)
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    assert not any("original_module" in key for key in learning)
    for part in ("lora_A", "lora_B", "writer.key", "gate", "head"):
        assert any(part in key for key in learning), part
    train(model, inputs)
    for key, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (key in learning), key
    ait.freeze_backbone(model, frozen=False)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before


def test_injected_balance_loss_reaches_the_copy_that_peft_trains() -> None:
    make, inputs, targets, head = HOSTS["timm ViT"]
    torch.manual_seed(0)
    options = OPTIONS | {"balance_weight": 1.0}
    model = wrap(ait.insert_workspace(make(), **options), targets, ["global_workspace", head]).train()
    twin = copy.deepcopy(model)
    with ait.inject_balance_loss(model):
        run(model, inputs).square().mean().backward()
    (run(twin, inputs).square().mean() + ait.balance_loss(twin)).backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if q.grad is not None:
            assert_close(p.grad, q.grad, key)


def test_removal_from_under_peft_is_refused_and_works_once_unloaded() -> None:
    make, inputs, targets, head = HOSTS["timm ViT"]
    torch.manual_seed(0)
    host = make().eval()
    expected = run(host, inputs)
    model = wrap(ait.insert_workspace(host, **OPTIONS), targets, ["global_workspace", head])
    with pytest.raises(ValueError, match="workspaces that peft has not wrapped"):
        ait.remove_workspace(model)
    bare = ait.remove_workspace(model.merge_and_unload())
    assert_close(run(bare, inputs).detach(), expected.detach())
