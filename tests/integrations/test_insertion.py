"""insert_workspace: blocks are found in every library, outputs stay, everything added learns, and it can be undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import ait
from tests.integrations.hosts import IMAGE_HOSTS, OPTIONS, hf_bert, hf_vit, logits, timm_vit, torchvision_vit


@pytest.fixture(params=IMAGE_HOSTS)
def host(request):
    make, size, blocks = IMAGE_HOSTS[request.param]
    torch.manual_seed(0)
    return make(), torch.randn(2, 3, size, size), blocks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["wrap", "parallel"])
def test_logits_are_the_same_bits_after_insertion(host, mode, training):
    model, images, blocks = host
    model.train(training)
    torch.manual_seed(1)
    before = logits(model, images)
    assert ait.insert_workspace(model, mode=mode, **OPTIONS) is model
    assert len(ait.workspaces(model)) == blocks
    torch.manual_seed(1)
    assert torch.equal(logits(model, images), before)


@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
def test_every_added_parameter_has_a_gradient_from_the_second_step_on(host, mode):
    model, images, _ = host
    host_names = {name for name, _ in model.named_parameters()}
    ait.insert_workspace(model.train(), mode=mode, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (logits(model, images).square().sum() + ait.balance_loss(model)).backward()
        optimizer.step()
    added = {name: p.grad for name, p in model.named_parameters() if name not in host_names}
    assert added
    without = [name for name, grad in added.items() if grad is None or not grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
def test_removal_restores_the_host(host, mode):
    model, images, _ = host
    names = [name for name, _ in model.named_modules()]
    before = logits(model.eval(), images)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    ait.insert_workspace(model, mode=mode, **OPTIONS)
    open_gates(model)
    assert not torch.equal(logits(model, images), before)
    assert ait.remove_workspace(model) is model
    assert [name for name, _ in model.named_modules()] == names
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(logits(model, images), before)


def open_gates(model: nn.Module) -> None:
    with torch.no_grad():
        for _, module in ait.workspaces(model):
            module.gate.fill_(0.5)


@pytest.mark.parametrize("mode", ["wrap", "parallel"])
def test_output_is_the_mlps_plus_the_gated_retrieval(mode):
    model = ait.insert_workspace(timm_vit(), [1], mode=mode, **OPTIONS).eval()
    open_gates(model)
    block, x = model.blocks[1], torch.randn(2, 17, 32)
    inserted = block.global_workspace if hasattr(block, "global_workspace") else block.mlp.global_workspace
    y = block.mlp.fc2(block.mlp.act(block.mlp.fc1(x)))
    source = y if mode == "wrap" else x
    expected = y + inserted.gate * inserted.workspace(inserted.norm(source))
    torch.testing.assert_close(block.mlp(x), expected)


def test_host_names_in_the_state_dict_stay_and_the_round_trip_is_exact():
    model, names = timm_vit(), set(timm_vit().state_dict())
    ait.insert_workspace(model, **OPTIONS)
    open_gates(model)
    state = model.state_dict()
    assert names < set(state)
    other = ait.insert_workspace(timm_vit(), **OPTIONS)
    other.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("make", [timm_vit, torchvision_vit, hf_vit])
def test_a_copy_uses_its_own_workspace(make, clone):
    model = ait.insert_workspace(make(), **OPTIONS).eval()
    images = torch.randn(2, 3, 32, 32)
    other = clone(model)
    open_gates(other)
    assert not torch.equal(logits(other, images), logits(model, images))
    open_gates(model)
    assert torch.equal(logits(other, images), logits(model, images))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2]), ([0, -1], [0, 2]), (slice(1, None), [1, 2]), (range(2), [0, 1])],
    ids=["all", "numbers", "slice", "range"],
)
def test_layers_are_numbered_in_forward_order(layers, expected):
    model = ait.insert_workspace(timm_vit(), layers, **OPTIONS)
    assert [module.insertion.layer for _, module in ait.workspaces(model)] == expected


def test_summary_tells_layers_parameters_and_flops():
    model = timm_vit()
    before = ait.count_parameters(model).total
    ait.insert_workspace(model, [0, 2], **OPTIONS)
    added = ait.count_parameters(model).total - before  # memory entries included
    text = ait.workspaces(model).summary()
    assert "Block" in text and "FLOPs" in text and f"(+{added:,}, +{100 * added / before:.2f}%" in text
    assert "blocks.0." in text and "blocks.1." not in text and "blocks.2." in text


def test_vit_base_grows_by_at_most_seven_percent():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    before = sum(p.numel() for p in model.parameters())
    ait.insert_workspace(model)
    assert sum(p.numel() for p in model.parameters()) <= 1.07 * before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_follows_the_host_and_the_memory_keeps_float32_at_least(dtype):
    model = ait.insert_workspace(timm_vit().to(dtype), **OPTIONS)
    for _, module in ait.workspaces(model):
        assert module.norm.weight.dtype == module.gate.dtype == dtype
        assert module.workspace.memory.gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_class_tokens_stay_out_of_the_competition_when_asked():
    torch.manual_seed(0)
    model = ait.insert_workspace(timm_vit(), [0], prefix_tokens="out", **OPTIONS).train()
    inside = ait.insert_workspace(copy_host(model), [0], prefix_tokens="in", **OPTIONS).train()
    x = torch.randn(2, 17, 32)
    memories = []
    for net in (model, inside):
        ((_, module),) = ait.workspaces(net)
        start = module.workspace.memory.gamma.clone()
        for first in (0.0, 30.0):
            module.workspace.memory.gamma.copy_(start)
            changed = x.clone()
            changed[:, 0] += first * torch.linspace(-1, 1, 32)
            net.blocks[0].mlp(changed)
            memories.append(module.workspace.memory.gamma.clone())
    assert torch.equal(memories[0], memories[1])  # out: what the class token is leaves no trace
    assert not torch.equal(memories[2], memories[3])


def copy_host(model: nn.Module) -> nn.Module:
    return ait.remove_workspace(copy.deepcopy(model))


@pytest.mark.parametrize("by_position", [False, True])
def test_padding_of_text_models_never_writes(by_position):
    torch.manual_seed(0)
    model = ait.insert_workspace(hf_bert(hidden_dropout_prob=0.0), **OPTIONS).train()
    tokens, mask = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    other = tokens.clone()
    other[1, 5:] = 7  # other padding
    memories = []
    for ids in (tokens, other):
        net = copy.deepcopy(model)
        torch.manual_seed(2)
        net(ids, mask) if by_position else net(input_ids=ids, attention_mask=mask)
        memories.append([module.workspace.memory.gamma for _, module in ait.workspaces(net)])
    for one, two in zip(*memories, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    net = copy.deepcopy(model)
    torch.manual_seed(2)
    net(input_ids=other)
    assert any(
        (module.workspace.memory.gamma - memory).abs().max() > 1e-3
        for (_, module), memory in zip(ait.workspaces(net), memories[0], strict=True)
    )


@pytest.mark.parametrize("make", [timm_vit, hf_bert], ids=["timm", "transformers"])
def test_activation_checkpointing_changes_neither_gradients_nor_memory(make):
    torch.manual_seed(0)
    options = {} if make is timm_vit else dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = ait.insert_workspace(make(**options), **OPTIONS).train()
    open_gates(model)
    checkpointed = copy.deepcopy(model)
    if make is timm_vit:
        checkpointed.set_grad_checkpointing()
        inputs = dict(x=torch.randn(2, 3, 32, 32))
    else:
        checkpointed.gradient_checkpointing_enable()
        inputs = dict(input_ids=torch.randint(1, 50, (2, 9)), attention_mask=torch.ones(2, 9, dtype=torch.long))
        inputs["attention_mask"][0, 6:] = 0
    for net in (model, checkpointed):
        out = net(**inputs)
        out = out if isinstance(out, torch.Tensor) else out.logits
        (out.square().sum() + ait.balance_loss(net)).backward()
    for (name, one), (_, two) in zip(model.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (_, one), (_, two) in zip(ait.workspaces(model), ait.workspaces(checkpointed), strict=True):
        assert torch.equal(one.workspace.memory.gamma, two.workspace.memory.gamma)


@pytest.mark.slow
@pytest.mark.parametrize("make", [timm_vit, hf_vit], ids=["timm", "transformers"])
def test_compiled_as_one_graph_it_computes_the_same(make):
    torch.manual_seed(0)
    model = ait.insert_workspace(make(), [1], **OPTIONS).eval()
    open_gates(model)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, images), logits(model, images))
    twin = copy.deepcopy(model).train()
    model.train()
    logits(torch.compile(twin, fullgraph=True, backend="aot_eager"), images).square().sum().backward()
    logits(model, images).square().sum().backward()
    for (name, one), (_, two) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", [timm_vit, torchvision_vit], ids=["timm", "torchvision"])
def test_exported_in_evaluation_it_computes_the_same(make):
    model = ait.insert_workspace(make(), **OPTIONS).eval()
    open_gates(model)
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))
