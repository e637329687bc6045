"""What cannot be done says so, and leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ait
from tests.integrations.small_hosts import (
    FEW,
    SMALL,
    TEXT,
    assert_unchanged,
    bert,
    forward,
    images,
    sentences,
    timm_model,
    transformers_model,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def refuses(model: nn.Module, match: str, *args: Any, **kwargs: Any) -> None:
    def insert() -> None:
        with pytest.raises(ValueError, match=match):
            ait.insert_workspace(model, *args, **kwargs)

    assert_unchanged(model, insert)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(layers=[2]), r"different integers from -2 to 1 \(2 blocks were found\), got 2"),
        (dict(layers=[-3]), "got -3"),
        (dict(layers=[0, -2]), r"different integers.*got \[0, -2\]"),
        (dict(layers=[]), "which are none of 2 blocks"),
        (dict(layers=slice(5, 9)), "which are none of 2 blocks"),
        (dict(layers="last"), "layers 'all', a slice, or different integers.*got 'last'"),
        (dict(layers=[True]), "got True"),
        (dict(layers=1), "got 1"),
        (dict(mode="around"), "mode to be one of 'wrap', 'parallel', 'replace', got 'around'"),
        (dict(num_slot=3), "options of mode 'wrap', got 'num_slot'; did you mean 'num_slots'.* There are 'num_slots'"),
        (dict(hidden_dim=3), "options of mode 'wrap', got 'hidden_dim'"),
        (dict(device="cpu"), "no device: it is that of the host"),
        (dict(num_slots=0), "num_slots"),
        (dict(top_k=3, top_k_ratio=0.5), "top_k or top_k_ratio, not both"),
        (dict(generator=3), "generator to be a torch.Generator"),
        (dict(prefix_tokens="some"), "prefix_tokens 'in', 'out' or a number of tokens, got 'some'"),
        (dict(prefix_tokens=-1), "prefix_tokens"),
    ],
)
def test_arguments(arguments: dict[str, Any], match: str) -> None:
    refuses(timm_model(), f"insert_workspace: .*{match}|{match}", **arguments)
    refuses(bert(), match, **arguments)


def test_unknown_number_of_class_tokens() -> None:
    refuses(bert(), "prefix_tokens 'in', or the number.*got 'out', and BertLayer", prefix_tokens="out")


@pytest.mark.parametrize("second", ["wrap", "replace"])
@pytest.mark.parametrize("first", ["wrap", "parallel", "replace"])
def test_inserting_twice(first: Any, second: Any) -> None:
    model = ait.insert_workspace(timm_model(), [0], mode=first, **FEW)
    refuses(model, "without inserted workspaces .*got VisionTransformer with 1, the first at 'blocks.0", mode=second)


def test_a_model_that_was_built_with_workspaces() -> None:
    model = ait.create_model("ait_tiny", img_size=8, patch_size=4, num_classes=2)
    refuses(model, "blocks without a workspace, got Block")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        lambda: timm_model("resnet10t"),
        lambda: timm_model("mixer_s32_224", img_size=32),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), 2).layers[0].linear1,
    ],
)
def test_no_vit_found(build: Callable[[], nn.Module]) -> None:
    refuses(build(), "expected a ViT or a text encoder: a list of blocks, .*without such a block")


def test_no_module_at_all() -> None:
    for function in (ait.insert_workspace, ait.remove_workspace, ait.workspaces, ait.workspace_state_dict):
        with pytest.raises(ValueError, match=r"expected a torch.nn.Module, got list"):
            function([])


@pytest.mark.parametrize("name", ["ParallelScalingBlock", "ParallelThingsBlock", "DiffParallelScalingBlock"])
def test_blocks_whose_mlp_is_fused_or_parallel_are_named(name: str) -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    if not hasattr(vision_transformer, name):
        pytest.skip(f"this timm has no {name}")
    model = timm_model(block_fn=getattr(vision_transformer, name))
    refuses(model, rf"blocks with an MLP of their own, got {name} \('blocks.0', layer 0\)")


def test_layers_that_have_a_place_are_listed() -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    model = timm_model()
    model.blocks[0] = vision_transformer.ParallelScalingBlock(32, 2)
    refuses(model, r"layers that have: \[1\], got ParallelScalingBlock")
    ait.insert_workspace(model, [1], **FEW)


def test_torchs_own_encoder_layer_has_no_place() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), 2)
    refuses(model, "got TransformerEncoderLayer")


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: transformers_model("GPT2Model", "GPT2Config", n_embd=32, n_layer=1, n_head=2, vocab_size=50),
    "Llama": lambda: transformers_model("LlamaModel", "LlamaConfig", **SMALL, **TEXT, pad_token_id=0),
    "OPT": lambda: transformers_model("OPTModel", "OPTConfig", **SMALL, **TEXT, word_embed_proj_dim=32, ffn_dim=64),
    "BLOOM": lambda: transformers_model(
        "BloomModel", "BloomConfig", hidden_size=32, n_layer=1, n_head=2, vocab_size=50
    ),
    "CLIP's text": lambda: transformers_model(
        "CLIPTextModel", "CLIPTextConfig", **SMALL, **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "BERT as decoder": lambda: bert(is_decoder=True),
}


class Masked(nn.Module):
    """A home-made decoder: its mask is a buffer."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.blocks = ait.create_model("vit_tiny", img_size=8, patch_size=4, num_classes=2).blocks
        self.register_buffer("attention_bias", mask)


DECODERS |= {
    "boolean mask": lambda: Masked(torch.ones(6, 6, dtype=torch.bool).tril()),
    "additive mask": lambda: Masked(torch.full((6, 6), -torch.inf).triu(1)),
}


@pytest.mark.parametrize("name", DECODERS)
def test_causal_decoders(name: str) -> None:
    refuses(DECODERS[name](), "expected an encoder: .*would see their future.*, got ", **FEW)


def test_encoder_of_a_model_with_both_is_taken_and_its_decoder_not() -> None:
    config = dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50)
    model = transformers_model("T5Model", "T5Config", **config, decoder_start_token_id=0)
    refuses(model, "of a model with both, pass the encoder")
    refuses(model.decoder, "T5Config.is_decoder is True")
    inputs = sentences()
    expected = forward(model.encoder, inputs)
    assert torch.equal(forward(ait.insert_workspace(model.encoder, **FEW), inputs), expected)


def test_mixture_of_experts() -> None:
    class SparseMoeMlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 2)
            self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    model = timm_model()
    model.blocks[1].mlp = SparseMoeMlp()
    refuses(model, r"got Block \('blocks.1', layer 1\): its MLP, SparseMoeMlp, is a mixture of experts")


def test_mlp_that_changes_the_width_has_room_in_wrap_alone() -> None:
    model = timm_model()
    model.blocks[0].mlp.fc2 = nn.Linear(128, 16)
    for mode in ("parallel", "replace"):
        refuses(model, rf"as wide at the end as at the start in mode '{mode}', got Block .*: 32 to 16", mode=mode)
    ait.insert_workspace(model, **FEW)


def test_an_mlp_that_two_blocks_share() -> None:
    model = timm_model()
    model.blocks[1].mlp = model.blocks[0].mlp
    refuses(model, "blocks with an MLP each, got Block")


def test_feed_forward_in_chunks() -> None:
    refuses(bert(chunk_size_feed_forward=2), "all their tokens to the MLP at once, got BertLayer")


def test_replacing_a_pair_with_something_between() -> None:
    model = transformers_model("AlbertModel", "AlbertConfig", **SMALL, **TEXT, embedding_size=16)
    refuses(model, "one module in mode 'replace'; use 'wrap', got AlbertLayer", mode="replace")


def test_data_parallel_is_refused_with_the_way_out() -> None:
    refuses(nn.DataParallel(timm_model()), "outside of torch.nn.DataParallel.*DistributedDataParallel")
    refuses(nn.Sequential(nn.DataParallel(timm_model())), r"got DataParallel \('0'\)")


def replica_of(module: nn.Module) -> nn.Module:
    """As torch.nn.DataParallel makes them, one a device."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter)
    for name, child in module._modules.items():
        setattr(replica, name, None if child is None else replica_of(child))
    return replica


@pytest.mark.parametrize("mode", ["wrap", "replace"])
def test_a_replica_of_data_parallel_does_not_run(mode: Any) -> None:
    model = ait.insert_workspace(timm_model(), mode=mode, **FEW).train()
    with pytest.raises(RuntimeError, match=r"not in torch.nn.DataParallel, got one of its replicas"):
        replica_of(model)(images())
    model(images())


def test_a_replica_of_our_own_layer_does_not_write() -> None:
    layer = ait.GlobalWorkspaceLayer(16, **FEW)
    x = torch.randn(2, 5, 16)
    with pytest.raises(RuntimeError, match=r"GlobalWorkspace: .*DistributedDataParallel"):
        replica_of(layer)(x)
    layer.eval()
    assert torch.equal(replica_of(layer)(x), layer(x))


def test_compiled_hosts() -> None:
    refuses(torch.compile(timm_model()), "not compiled yet.*insert first, got OptimizedModule")
    model = timm_model()
    model.blocks[0].compile()
    with pytest.raises(ValueError, match=r"not compiled yet.*got Block \('blocks.0'\)"):
        ait.insert_workspace(model)


def test_scripted_traced_and_frozen_hosts() -> None:
    host = ait.create_model("vit_tiny", img_size=8, patch_size=4, num_classes=2, depth=1).eval()
    traced = torch.jit.trace(host, torch.randn(1, 3, 8, 8))
    with_scripted_head = timm_model()
    with_scripted_head.head = torch.jit.script(nn.Linear(32, 5))
    for model in (traced, torch.jit.freeze(traced), torch.jit.script(nn.Linear(3, 3)), with_scripted_head):
        with pytest.raises(ValueError, match=r"not a scripted, traced or frozen one; insert before torch.jit"):
            ait.insert_workspace(model)


def test_exported_hosts() -> None:
    program = torch.export.export(timm_model(), (images(),))
    with pytest.raises(ValueError, match="not a traced or exported graph"):
        ait.insert_workspace(program.module())


def quantized_dynamically() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(timm_model(), {nn.Linear}, dtype=torch.qint8)


def with_int8_weights() -> nn.Module:
    model = timm_model()
    model.blocks[0].mlp.fc1.weight = nn.Parameter(torch.zeros(128, 32, dtype=torch.int8), requires_grad=False)
    return model


def with_float8_weights() -> nn.Module:
    model = timm_model()
    model.blocks[0].mlp.fc1.weight = nn.Parameter(torch.zeros(128, 32).to(torch.float8_e4m3fn), requires_grad=False)
    return model


def with_packed_weights() -> nn.Module:
    model = timm_model()
    model.blocks[0].mlp.fc1.register_buffer("qweight", torch.zeros(4, 128, dtype=torch.int32))
    return model


def with_quantization_config() -> nn.Module:
    model = bert()
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


@pytest.mark.parametrize(
    "build",
    [quantized_dynamically, with_int8_weights, with_float8_weights, with_packed_weights, with_quantization_config],
)
def test_quantised_hosts(build: Callable[[], nn.Module]) -> None:
    model = build()
    with pytest.raises(ValueError, match="that is not quantised, got"):
        ait.insert_workspace(model)
    assert not any("global_workspace" in name for name, _ in model.named_modules())


def test_offloaded_hosts() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(timm_model())
    with pytest.raises(ValueError, match="MLPs that are in memory; load the host without offloading, got Block"):
        ait.insert_workspace(model)


def test_lazy_hosts() -> None:
    model = timm_model()
    model.head = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="lazy modules have run once, got LazyLinear"):
        ait.insert_workspace(model)


def test_removal_of_what_cannot_be_taken_out() -> None:
    for model in (timm_model(), ait.create_model("ait_tiny", img_size=8, patch_size=4, num_classes=2)):
        with pytest.raises(ValueError, match=r"put in by ait\.insert_workspace"):
            ait.remove_workspace(model)
    model = ait.insert_workspace(timm_model(), mode="replace", **FEW)

    def remove() -> None:
        with pytest.raises(ValueError, match=r"mode 'wrap' or 'parallel'.*got 'blocks.0.mlp', which took the place"):
            ait.remove_workspace(model)

    assert_unchanged(model, remove)


def test_mlp_that_returns_no_tensor() -> None:
    model = ait.insert_workspace(timm_model(), [0], **FEW)
    model.blocks[0].mlp.forward = lambda x: (x, x)
    with pytest.raises(ValueError, match="expected Mlp to return a tensor, got tuple"):
        model(images())


def test_a_failed_insertion_can_be_repeated_rightly() -> None:
    model = timm_model()
    expected = copy.deepcopy(model)
    for arguments in (dict(layers=[9]), dict(num_slots=-1), dict(mode="x")):
        with pytest.raises(ValueError):
            ait.insert_workspace(model, **arguments)
    x = images()
    assert torch.equal(ait.insert_workspace(model, **FEW)(x), expected(x))
