"""Tests for the environments of test_older_releases.py, which runs this file in them."""

from __future__ import annotations

import pytest
import torch

import ait
from tests.integrations.small_hosts import FEW, forward, open_gates, record_writes
from tests.integrations.transformers_hosts import CLASSES, TEXT_MODELS, build, inputs_of, transformers


def test_release_is_an_older_one() -> None:
    assert transformers().__version__.startswith("4.")
    assert hasattr(build("ViT").vit, "encoder"), "the layout with encoder.layer[i].intermediate and output"


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
@pytest.mark.parametrize("name", CLASSES)
def test_insertion_changes_no_bit_and_an_open_gate_does(name: str, mode: str) -> None:
    model, inputs = build(name), inputs_of(name)
    expected = forward(model, inputs)
    ait.insert_workspace(model, mode=mode, **FEW)
    assert len(ait.workspaces(model)) == 3
    assert torch.equal(forward(model, inputs), expected)
    open_gates(model, 5.0)
    assert not torch.equal(forward(model, inputs), expected)
    ait.remove_workspace(model)
    assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_replacing_leaves_the_residual(name: str) -> None:
    model, inputs = ait.insert_workspace(build(name), mode="replace", **FEW), inputs_of(name)
    with torch.no_grad():
        for _, module in ait.workspaces(model):
            layer = module.global_workspace
            for parameter in (layer.norm.weight, layer.norm.bias, *layer.workspace.reader.parameters()):
                parameter.zero_()
    silent = forward(model, inputs)
    reference = build(name)
    reference.load_state_dict(model.state_dict(), strict=False)
    for path, module in reference.named_modules():
        if path.endswith((".mlp", ".ffn", "output.dense")) and "attention" not in path:
            module.register_forward_hook(lambda _, args, y: torch.zeros_like(y))
    assert torch.equal(silent, forward(reference, inputs))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padding_never_writes(name: str) -> None:
    model, inputs = ait.insert_workspace(build(name), **FEW).train(), inputs_of(name)
    masks = record_writes(model)
    forward(model, inputs)
    model(*inputs.values())
    assert all(torch.equal(mask, inputs["attention_mask"] == 0) for mask in masks)


@pytest.mark.parametrize("name", CLASSES)
def test_every_added_parameter_learns_from_the_second_step_on(name: str) -> None:
    model, inputs = ait.insert_workspace(build(name), mode="parallel", **FEW).train(), inputs_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = forward(model, inputs)
        (output * torch.randn_like(output)).mean().add(ait.balance_loss(model)).backward()
        optimizer.step()
    added = {key: p.grad for key, p in model.named_parameters() if "global_workspace" in key}
    assert [key for key, gradient in added.items() if gradient is None or not gradient.any()] == []


def test_activation_checkpointing_runs() -> None:
    model, inputs = ait.insert_workspace(build("ViT"), **FEW).train(), inputs_of("ViT")
    model.gradient_checkpointing_enable()
    (forward(model, inputs).sum() + ait.balance_loss(model)).backward()


def test_causal_decoders_are_refused() -> None:
    library = transformers()
    gpt2 = library.GPT2Model(library.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    llama = library.LlamaModel(library.LlamaConfig(**small))
    bert = library.BertModel(library.BertConfig(**small, is_decoder=True))
    for model in (gpt2, llama, bert, build("CLIP").text_model):
        with pytest.raises(ValueError, match="would see their future"):
            ait.insert_workspace(model)
