"""insert_workspace, remove_workspace: what cannot be done is said, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ait
from tests.integrations.hosts import OPTIONS, fingerprint, hf_bert, timm_vit


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def clip_text() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))


def parallel_blocks() -> nn.Module:
    blocks = pytest.importorskip("timm.models.vision_transformer")
    return timm_vit(block_fn=blocks.ParallelScalingBlock)


@pytest.mark.parametrize(
    "make",
    [gpt2, llama, clip_text, lambda: hf_bert(is_decoder=True)],
    ids=["GPT-2", "Llama", "CLIP text", "BERT decoder"],
)
def test_causal_decoders_are_refused(make):
    model = make()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="future"):
        ait.insert_workspace(model, **OPTIONS)
    assert fingerprint(model) == before


BAD = {
    "a fused MLP": (parallel_blocks, {}, "ParallelScalingBlock"),
    "no ViT": (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "Sequential"),
    "no module": (lambda: 3, {}, "int"),
    "a layer that does not exist": (timm_vit, dict(layers=[0, 3]), "3"),
    "no layers": (timm_vit, dict(layers=[]), r"\[\]"),
    "a layer twice": (timm_vit, dict(layers=[0, -3]), "layers"),
    "a layer that is no number": (timm_vit, dict(layers=["first"]), "first"),
    "an unknown mode": (timm_vit, dict(mode="append"), "append"),
    "an unknown option": (timm_vit, dict(num_memories=3), "num_memories"),
    "a bad option": (timm_vit, dict(num_slots=0), "num_slots"),
    "a dtype of its own": (timm_vit, dict(dtype=torch.float64), "dtype"),
    "unknown prefix tokens": (timm_vit, dict(prefix_tokens="some"), "prefix_tokens"),
    "DataParallel": (lambda: nn.DataParallel(timm_vit()), {}, "DistributedDataParallel"),
    "a scripted model": (lambda: torch.jit.trace(timm_vit().eval(), torch.randn(1, 3, 32, 32)), {}, "eager model"),
    "a compiled model": (lambda: torch.compile(timm_vit()), {}, "compiled"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_said_and_the_model_is_left_as_it_was(case):
    make, arguments, message = BAD[case]
    model = make()
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(ValueError, match=message) as error:
        ait.insert_workspace(model, **(dict(OPTIONS) | arguments))
    assert str(error.value).partition(": expected")[0] in ("insert_workspace", "GlobalWorkspace")
    if before is not None:
        assert fingerprint(model) == before


def test_a_second_insertion_is_refused():
    model = ait.insert_workspace(timm_vit(), [0], **OPTIONS)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="without inserted workspaces"):
        ait.insert_workspace(model, [1], **OPTIONS)
    assert fingerprint(model) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_host_is_refused():
    model = torch.ao.quantization.quantize_dynamic(timm_vit().eval(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="quantised"):
        ait.insert_workspace(model, **OPTIONS)


def test_a_host_with_frozen_parameters_is_welcome_and_the_added_ones_learn():
    model = timm_vit().requires_grad_(False)
    ait.insert_workspace(model, **OPTIONS)
    assert all(p.requires_grad == ("global_workspace" in name) for name, p in model.named_parameters())


def test_a_replica_of_data_parallel_is_refused_at_run_time():
    model = ait.insert_workspace(timm_vit(), **OPTIONS)
    for module in model.modules():
        module._is_replica = True
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("make", [timm_vit, lambda: ait.insert_workspace(timm_vit(), mode="replace", **OPTIONS)])
def test_removal_of_nothing_or_of_a_replaced_mlp_is_refused(make):
    model = make()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="remove_workspace: expected"):
        ait.remove_workspace(model)
    assert fingerprint(model) == before
