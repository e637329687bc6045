"""What an inserted workspace computes, learns and survives."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ait
from tests.integrations.small_hosts import (
    FEW,
    IMAGE,
    SMALL,
    bert,
    forward,
    gated,
    images,
    open_gates,
    record_writes,
    sentences,
    snapshot,
    timm_model,
    transformers_model,
)
from tests.tolerances import assert_close


def vit(**arguments: Any) -> nn.Module:
    return transformers_model("ViTModel", "ViTConfig", **SMALL, **IMAGE, **arguments)


def step(model: nn.Module, inputs: Any, lr: float = 0.1) -> dict[str, torch.Tensor]:
    """One step of gradient descent; the gradients."""
    model.zero_grad()
    output = forward(model, inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    ((output * weights).mean() + ait.balance_loss(model)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return gradients


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
@pytest.mark.parametrize("name", ["timm", "BERT"])
def test_formula_of_the_mode(mode: Any, name: str) -> None:
    model, inputs = (timm_model(), images()) if name == "timm" else (bert(), sentences())
    ait.insert_workspace(model, [1], mode=mode, **FEW)
    open_gates(model)
    (module,) = gated(model)
    block = model.blocks[1] if name == "timm" else model.encoder.layer[1]
    first, last = (block.mlp, block.mlp) if name == "timm" else (block.intermediate, block.output.dropout)
    seen: dict[str, torch.Tensor] = {}
    first.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    last.register_forward_hook(lambda _, args, y: seen.update(after=y))
    module.register_forward_pre_hook(lambda _, args: seen.update(y=args[0]))
    forward(model, inputs)
    source = seen["y"] if mode == "wrap" else seen["x"]
    expected = seen["y"] + 0.5 * module.workspace(module.norm(source))
    assert_close(seen["after"].detach(), expected.detach())


def test_gradients_of_the_host_are_those_without_workspace_at_first() -> None:
    model = timm_model().train()
    reference = copy.deepcopy(model)
    ait.insert_workspace(model, balance_weight=0.0, **FEW)
    x = images()
    gradients = step(model, x)
    reference(x).mul(torch.randn(4, 5, generator=torch.Generator().manual_seed(1))).mean().backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
def test_in_training_the_host_draws_the_same_dropout_as_without_workspace(mode: Any) -> None:
    model = bert().train()
    inputs = sentences()
    torch.manual_seed(3)
    expected = forward(model, inputs)
    ait.insert_workspace(model, mode=mode, **FEW)
    torch.manual_seed(3)
    assert torch.equal(forward(model, inputs), expected)


def test_a_frozen_host_is_taken_and_its_workspace_learns() -> None:
    model = timm_model().requires_grad_(False).train()
    ait.insert_workspace(model, **FEW)
    step(model, images())
    assert set(step(model, images())) == {name for name, _ in model.named_parameters() if "global_workspace" in name}


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
def test_vit_base_grows_by_at_most_seven_percent(mode: Any) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    before = ait.count_parameters(model).total
    ait.insert_workspace(model, mode=mode)
    assert len(ait.workspaces(model)) == 12
    assert 0 < ait.count_parameters(model).total - before <= 0.07 * before


def test_tokens_that_are_not_finite_spoil_no_other_token() -> None:
    model = ait.insert_workspace(timm_model(), **FEW)
    module = gated(model)[0].train()
    y = torch.randn(2, 9, 32)
    y[0, 3], y[1, 0, 0] = torch.inf, torch.nan
    z = module(y)
    finite = torch.ones(2, 9, dtype=torch.bool)
    finite[0, 3] = finite[1, 0] = False
    assert torch.equal(z[finite], y[finite])
    assert not torch.isfinite(z[~finite]).all(-1).any()


def test_device_dtype_and_training_mode_are_those_of_the_host() -> None:
    model = ait.insert_workspace(timm_model().to(torch.bfloat16).train(), **FEW)
    for module in gated(model):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert module.workspace.memory.gamma.dtype == torch.float32
        assert all(part.training for part in module.modules())
    with torch.device("meta"):
        host = timm_model()
    assert all(p.is_meta for p in ait.insert_workspace(host, **FEW).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_stay_the_same_in_every_dtype_and_after_conversion(dtype: torch.dtype) -> None:
    x = images().to(dtype)
    for convert_first in (True, False):
        model = timm_model()
        expected = copy.deepcopy(model).to(dtype)(x)
        if convert_first:
            ait.insert_workspace(model.to(dtype), **FEW)
        else:
            ait.insert_workspace(model, **FEW).to(dtype)
        assert torch.equal(model(x), expected)
        open_gates(model)
        output = model.train()(x)
        assert output.dtype == dtype and torch.isfinite(output).all()


def test_under_autocast_logits_stay_the_same() -> None:
    model, x = timm_model(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        assert torch.equal(ait.insert_workspace(model, **FEW)(x), expected)
        y = torch.randn(2, 9, 32, dtype=torch.bfloat16)
        assert gated(model)[0](y).dtype == torch.bfloat16
        (model.train()(x).float().sum() + ait.balance_loss(model)).backward()


@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
@pytest.mark.parametrize("name", ["timm", "BERT"])
def test_copies_and_pickles_are_whole_and_apart(mode: Any, name: str) -> None:
    model, inputs = (timm_model(), images()) if name == "timm" else (bert(), sentences())
    ait.insert_workspace(model, mode=mode, **FEW).train()
    forward(model, inputs)
    model.eval()
    if mode != "replace":
        open_gates(model)
    expected = forward(model, inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(forward(other, inputs), expected)
        with torch.no_grad():
            for _, module in ait.workspaces(other):
                for parameter in module.parameters():
                    parameter.fill_(0.3)
        assert not torch.equal(forward(other, inputs), expected)
        assert torch.equal(forward(model, inputs), expected)
        if mode != "replace":
            ait.remove_workspace(other)
    forward(copies[0].train(), inputs)


@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
def test_state_dict_goes_round_strictly(mode: Any) -> None:
    first, second = (ait.insert_workspace(timm_model(), mode=mode, **FEW) for _ in range(2))
    first.train()(images())
    second.load_state_dict(first.state_dict(), strict=True)
    x = images()
    assert torch.equal(first.eval()(x), second(x))


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
@pytest.mark.parametrize("name", ["timm", "ViT", "BERT"])
def test_removal_leaves_nothing_behind(mode: Any, name: str) -> None:
    model = {"timm": timm_model, "ViT": vit, "BERT": bert}[name]()
    before = snapshot(model)
    ait.insert_workspace(model, mode=mode, **FEW)
    assert snapshot(model) != before
    assert ait.remove_workspace(model) is model
    assert snapshot(model) == before
    ait.insert_workspace(model, mode=mode, **FEW)


@pytest.mark.parametrize("name", ["timm", "ViT", "ViT, reentrant"])
def test_activation_checkpointing_gives_the_same_gradients_and_one_write(name: str) -> None:
    model, x = (timm_model() if name == "timm" else vit(), images())
    ait.insert_workspace(model, **FEW).train()
    open_gates(model)
    reference = copy.deepcopy(model)
    if name == "timm":
        model.set_grad_checkpointing()
    else:
        reentrant = name.endswith("reentrant")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    for _ in range(2):
        x = images().requires_grad_()
        expected, gradients = step(reference, x), step(model, x)
        assert expected.keys() == gradients.keys()
        for key, value in expected.items():
            assert_close(gradients[key], value, key)
    for module, other in zip(gated(model), gated(reference), strict=True):
        assert torch.equal(module.workspace.memory.gamma, other.workspace.memory.gamma)


@pytest.mark.parametrize("name", ["timm", "BERT"])
def test_compiled_whole_it_trains_as_in_eager_mode(name: str) -> None:
    model, inputs = (timm_model(), images()) if name == "timm" else (bert(hidden_dropout_prob=0.0), sentences())
    ait.insert_workspace(model, mode="parallel", prefix_tokens=1, **FEW)
    open_gates(model)
    if name == "BERT":
        model.set_attn_implementation("eager")
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(forward(compiled, inputs).detach(), forward(reference, inputs).detach())
    for host in (model, reference):
        host.train()
        for module in host.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for _ in range(2):
        outputs = []
        for host, run in ((reference, reference), (model, compiled)):
            host.zero_grad()
            output = forward(run, inputs)
            (output.square().mean() + ait.balance_loss(run)).backward()
            outputs.append((output, {n: p.grad for n, p in host.named_parameters() if p.grad is not None}))
        (expected, expected_gradients), (output, gradients) = outputs
        assert_close(output.detach(), expected.detach())
        for key, gradient in gradients.items():  # a compiled graph gives 0 where eager mode gives none
            value = expected_gradients.get(key, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    for module, other in zip(gated(model), gated(reference), strict=True):
        assert_close(module.workspace.memory.gamma, other.workspace.memory.gamma)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("timm", "wrap"), ("ViT", "parallel")])
def test_inductor_equals_eager_in_training_and_evaluation(name: str, mode: Any) -> None:
    model = timm_model(depth=1) if name == "timm" else vit()
    ait.insert_workspace(model, [0], mode=mode, **FEW).train()
    open_gates(model)
    reference, x = copy.deepcopy(model), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        outputs = [forward(run, x) for run in (reference, compiled)]
        for run, output in zip((reference, compiled), outputs, strict=True):
            (output.square().mean() + ait.balance_loss(run)).backward()
        assert_close(outputs[1].detach(), outputs[0].detach())
        gradients = dict(reference.named_parameters())
        for key, parameter in model.named_parameters():
            expected = gradients[key].grad
            if expected is not None:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=key)
        added = [p.grad for module in gated(model) for p in module.parameters()]
        assert all(gradient is not None and gradient.any() for gradient in added)
        for module, other in zip(gated(model), gated(reference), strict=True):
            assert_close(module.workspace.memory.gamma, other.workspace.memory.gamma)
    model.eval()
    assert_close(forward(compiled, x).detach(), forward(reference.eval(), x).detach())


@pytest.mark.parametrize("name", ["timm", "ViT", "BERT"])
def test_exported_program_equals_the_model(name: str) -> None:
    model = {"timm": timm_model, "ViT": vit, "BERT": bert}[name]()
    inputs = sentences() if name == "BERT" else images()
    ait.insert_workspace(model, mode="parallel", **FEW)
    open_gates(model)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    program = torch.export.export(model, args, kwargs).module()
    output = program(*args, **kwargs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    assert_close(output.detach(), forward(model, inputs).detach())


def test_distributed_training_keeps_masks_gradients_and_the_balance_loss(tmp_path: Path) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = ait.insert_workspace(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), **FEW).train()
        reference = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        masks, inputs = record_writes(wrapped), sentences()
        for _ in range(2):
            expected, gradients = step(reference, inputs), step(wrapped, inputs)
            for key, value in expected.items():
                assert_close(gradients[f"module.{key}"], value, key)
        assert all(torch.equal(mask, inputs["attention_mask"] == 0) for mask in masks)
        with pytest.raises(ValueError, match=r"not wrapped yet.*insert first, got DistributedDataParallel"):
            ait.insert_workspace(wrapped)
    finally:
        distributed.destroy_process_group()


def test_generator_makes_the_memories_reproducible() -> None:
    memories = []
    for _ in range(2):
        model = ait.insert_workspace(timm_model(), generator=torch.Generator().manual_seed(7), **FEW)
        memories.append([module.workspace.memory.gamma for module in gated(model)])
    assert all(torch.equal(a, b) for a, b in zip(*memories, strict=True))
    assert not torch.equal(memories[0][0], memories[0][1])


def test_reset_parameters_draws_anew_and_closes_the_gate() -> None:
    (module, *_) = gated(ait.insert_workspace(timm_model(), **FEW))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for value in module.state_dict().values():
            value.fill_(7)
    module.reset_parameters()
    for name, value in module.state_dict().items():
        assert not (value == 7).any(), name
        if name.endswith("norm.weight") or "gate" in name:
            assert torch.equal(value, before[name])
