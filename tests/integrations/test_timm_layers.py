"""The workspace layer as timm's ``mlp_layer=`` and ``block_fn=``, under every release's arguments."""

from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from tests.tolerances import assert_close

timm = pytest.importorskip("timm")

from timm.layers import Mlp, SwiGLU  # noqa: E402
from timm.models import vision_transformer as timm_vit  # noqa: E402

from ait.integrations.timm_layers import WorkspaceBlock, WorkspaceMlp  # noqa: E402

E = 16
WORKSPACE: dict[str, Any] = dict(num_slots=4, slot_dim=8, num_heads=2, top_k_ratio=0.5)
BLOCK: dict[str, Any] = {name: value for name, value in WORKSPACE.items() if name != "num_heads"} | {
    "workspace_heads": 2
}
VIT: dict[str, Any] = dict(img_size=8, patch_size=4, embed_dim=E, depth=2, num_heads=2, num_classes=3)
SmallMlp = functools.partial(WorkspaceMlp, **WORKSPACE)
SmallBlock = functools.partial(WorkspaceBlock, **BLOCK)


def make_vit(**options: Any) -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**VIT, **options})
    return model


def train_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of one training pass, balance loss included."""
    model.zero_grad()
    out = model(x)
    (out.square().sum() + ait.balance_loss(model)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_with_timm_s_defaults_it_is_the_published_layer() -> None:
    published = ait.GlobalWorkspaceLayer(E, **WORKSPACE, write_dropout=0.0)
    layer = SmallMlp(E, 4 * E, write_dropout=0.0)
    assert {name: p.shape for name, p in layer.named_parameters()} == {
        name: p.shape for name, p in published.named_parameters()
    }
    layer.load_state_dict(published.state_dict())
    x = torch.randn(3, 5, E)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(layer(ours), published(theirs))
    gradients, expected = train_step(layer, ours), train_step(published, theirs)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(layer.workspace.memory.gamma, published.workspace.memory.gamma)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(act_layer=nn.GELU, drop=0.0),  # 0.4 to 0.6
        dict(act_layer=nn.GELU, bias=True, drop=0.0),
        dict(act_layer=nn.GELU, norm_layer=None, bias=True, drop=0.0, use_conv=False),
        dict(act_layer=nn.GELU, norm_layer=None, bias=True, drop=0.0, device=None, dtype=None),
        dict(act_layer=None, out_features=E, bias=(True, True), drop=(0.0, 0.0), dtype=torch.float64),
    ],
)
def test_every_release_s_keywords_make_the_same_layer(arguments: dict[str, Any]) -> None:
    layer = SmallMlp(in_features=E, hidden_features=3 * E, **arguments).eval()
    plain = SmallMlp(E, 3 * E).eval()
    plain.load_state_dict(layer.state_dict())
    assert layer.fc1.weight.dtype == arguments.get("dtype", torch.float32) or arguments["dtype"] is None
    x = torch.randn(2, 3, E)
    assert_close(layer(x.to(layer.fc1.weight.dtype)).float(), plain(x))


def test_positional_arguments_stand_where_timm_has_them() -> None:
    layer = SmallMlp(E, 24, E, nn.ReLU, nn.LayerNorm, False, 0.25)
    assert (layer.fc1.out_features, layer.fc2.out_features, layer.drop1.p) == (24, E, 0.25)
    assert isinstance(layer.act, nn.ReLU) and isinstance(layer.hidden_norm, nn.LayerNorm) and layer.fc1.bias is None


def test_without_hidden_features_it_is_as_narrow_as_timm_s() -> None:
    assert SmallMlp(E).fc1.weight.shape == Mlp(E).fc1.weight.shape == (E, E)


@pytest.mark.parametrize(
    "options",
    [
        dict(act_layer=nn.SiLU),
        dict(norm_layer=functools.partial(nn.LayerNorm, eps=1e-3)),
        dict(bias=False),
        dict(bias=(False, True)),
        dict(drop=0.5),
        dict(drop=(0.3, 0.1), act_layer=nn.Tanh, norm_layer=nn.LayerNorm),
    ],
)
def test_what_timm_s_options_do_to_an_mlp_they_do_to_the_feed_forward(options: dict[str, Any]) -> None:
    layer, mlp = SmallMlp(E, 24, **options), Mlp(E, 24, **options)
    names = {"norm.weight": "hidden_norm.weight", "norm.bias": "hidden_norm.bias"}
    state = layer.state_dict()
    mlp.load_state_dict({name: state[names.get(name, name)] for name in mlp.state_dict()})
    x = torch.randn(2, 3, E)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(1)
    f = layer.feed_forward(ours)
    torch.manual_seed(1)
    expected = layer.norm(mlp(theirs))
    assert_close(f, expected)
    weight = torch.randn_like(f)
    f.backward(weight)
    expected.backward(weight)
    assert ours.grad is not None and theirs.grad is not None
    assert_close(ours.grad, theirs.grad)
    for name, parameter in mlp.named_parameters():
        gradient = layer.get_parameter(names.get(name, name)).grad
        assert gradient is not None and parameter.grad is not None
        assert_close(gradient, parameter.grad, name)


def test_the_prefix_reads_and_does_not_write() -> None:
    layer = SmallMlp(E, 24, prefix_tokens=2, write_dropout=0.0)
    other = copy.deepcopy(layer)
    published = ait.GlobalWorkspaceLayer(E, hidden_dim=24, **WORKSPACE, write_dropout=0.0)
    published.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6, E)
    changed = x.clone()
    changed[:, :2] = torch.randn(3, 2, E)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, :2] = True
    y = layer(x)
    assert torch.equal(y, published(x, mask))
    z = other(changed)
    assert torch.equal(layer.workspace.memory.gamma, other.workspace.memory.gamma)
    assert torch.equal(y[:, 2:], z[:, 2:]) and not torch.equal(y[:, :2], z[:, :2])


@pytest.mark.parametrize("weight_init", ["", "jax", "moco"])
def test_timm_s_initialisation_leaves_the_workspace_as_published(weight_init: str) -> None:
    model = make_vit(mlp_layer=functools.partial(WorkspaceMlp, num_slots=32, slot_dim=16), weight_init=weight_init)
    for block in model.blocks:
        query = block.mlp.workspace.writer.query.weight
        bound = 1 / math.sqrt(query.shape[1])  # as nn.Linear draws it; timm's would be 0.02, or Xavier's
        assert bound / 1.1 < query.abs().max() < bound
        assert query.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        norms = block.mlp.workspace.memory.gamma.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("way", ["init_weights", "reset_parameters"])
def test_a_layer_that_was_made_on_the_meta_device_can_be_filled(way: str) -> None:
    layer = SmallMlp(E, 24, device="meta").to_empty(device="cpu")
    for tensor in [*layer.parameters(), layer.workspace.memory.gamma]:
        torch.nn.init.constant_(tensor, math.nan)
    getattr(layer, way)()
    fresh = layer if way == "reset_parameters" else layer.workspace
    assert all(torch.isfinite(tensor).all() for tensor in fresh.state_dict().values())
    if way == "init_weights":
        assert layer.fc1.weight.isnan().all()


@pytest.mark.parametrize(
    "where", [dict(mlp_layer=SmallMlp), dict(block_fn=SmallBlock), dict(block_fn=SmallBlock, mlp_layer=SmallMlp)]
)
def test_a_vit_learns_with_it(where: dict[str, Any]) -> None:
    model = make_vit(**where)
    assert all(isinstance(block.mlp, WorkspaceMlp) and block.mlp.fc1.out_features == 4 * E for block in model.blocks)
    assert all(block.mlp.workspace.writer.num_heads == 2 for block in model.blocks)
    x = torch.randn(4, 3, 8, 8)
    before = [block.mlp.workspace.memory.gamma.clone() for block in model.blocks]
    gradients = train_step(model, x)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(not torch.equal(b.mlp.workspace.memory.gamma, a) for a, b in zip(before, model.blocks, strict=True))


def test_mlp_layer_and_block_fn_make_the_same_model() -> None:
    one, other = make_vit(mlp_layer=SmallMlp), make_vit(block_fn=SmallBlock)
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 3, 8, 8)
    a, b = train_step(one, x), train_step(other, x)
    assert a.keys() == b.keys() and len(a) == len(dict(one.named_parameters()))
    for block, twin in zip(one.blocks, other.blocks, strict=True):
        assert torch.equal(block.mlp.workspace.memory.skipped_updates, twin.mlp.workspace.memory.skipped_updates)
    assert torch.equal(one.eval()(x), one(x))


def test_block_options_reach_timm_s_block() -> None:
    model = make_vit(block_fn=SmallBlock, init_values=0.5, drop_path_rate=0.2, proj_drop_rate=0.1, qk_norm=True)
    block = model.blocks[1]
    assert isinstance(block, timm_vit.Block) and block.ls1.gamma[0].item() == 0.5
    assert block.drop_path2.drop_prob == pytest.approx(0.2) and block.mlp.drop1.p == 0.1
    assert isinstance(block.attn.q_norm, nn.LayerNorm)


def test_a_partial_of_mlp_layer_keeps_its_keywords_in_the_block() -> None:
    chosen = functools.partial(WorkspaceMlp, num_slots=3, slot_dim=4, prefix_tokens=1)
    block = WorkspaceBlock(E, 2, mlp_layer=chosen, slot_dim=6)
    assert tuple(block.mlp.workspace.memory.gamma.shape) == (3, 6) and block.mlp.prefix_tokens == 1
    assert WorkspaceBlock(E, 2, mlp_layer=functools.partial(Mlp, norm_layer=nn.LayerNorm), num_slots=5).mlp.dim == E


@pytest.mark.parametrize("block_fn", ["ResPostBlock", "ParallelThingsBlock"])
def test_timm_s_other_blocks_take_it_as_mlp_layer(block_fn: str) -> None:
    model = make_vit(block_fn=getattr(timm_vit, block_fn), mlp_layer=SmallMlp)
    found = [module for module in model.modules() if isinstance(module, WorkspaceMlp)]
    assert len(found) == (4 if block_fn == "ParallelThingsBlock" else 2)
    assert all(gradient.isfinite().all() for gradient in train_step(model, torch.randn(4, 3, 8, 8)).values())


def test_a_host_with_maps_takes_it_where_channels_are_last() -> None:
    options = dict(img_size=32, patch_size=8, embed_dim=E, depth=2, num_heads=2, window_size=2, global_attn_indexes=[1])
    model = timm.create_model("samvit_base_patch16", mlp_layer=SmallMlp, num_classes=3, **options)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 3)
    assert {name for name, _ in model.named_parameters()} == train_step(model, x).keys()


def test_a_prefix_needs_a_sequence() -> None:
    layer = SmallMlp(E, prefix_tokens=2)
    for shape in (2, 4, 4, E), (2, 1, E), (2, E):
        with pytest.raises(
            ValueError, match=rf"input \(B, N, E\) of at least prefix_tokens=2 tokens, got \({shape[0]}, "
        ):
            layer(torch.randn(shape))


def test_maps_with_channels_last_are_pools_of_tokens() -> None:
    layer = SmallMlp(E, 24).eval()
    x = torch.randn(2, 3, 4, E)
    assert_close(layer(x), layer(x.flatten(1, 2)).reshape(x.shape))


def test_state_dicts_and_copies_compute_the_same() -> None:
    model, other = make_vit(mlp_layer=SmallMlp), make_vit(mlp_layer=SmallMlp)
    x = torch.randn(4, 3, 8, 8)
    train_step(model, x)
    other.load_state_dict(model.state_dict())
    expected = model.eval()(x)
    assert torch.equal(other.eval()(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)


def test_the_plain_vit_s_weights_fill_the_feed_forward() -> None:
    plain, model = make_vit(), make_vit(mlp_layer=SmallMlp)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".mlp.norm." in name or ".mlp.workspace." in name for name in missing)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_slot=3), TypeError, "WorkspaceMlp: no option 'num_slot'; did you mean 'num_slots'"),
        (dict(gate_layer=nn.Sigmoid), TypeError, "no option 'gate_layer'"),
        (dict(generator=torch.Generator()), TypeError, "no option 'generator'"),
        (dict(out_features=8), ValueError, "expected out_features None or in_features=16, got 8"),
        (dict(use_conv=True), ValueError, "expected use_conv=False"),
        (dict(act_layer="gelu"), ValueError, "act_layer to be a class such as nn.GELU, got 'gelu'"),
        (dict(norm_layer="layernorm"), ValueError, "norm_layer to be a class"),
        (dict(bias=(True, True, True)), ValueError, "bias as one value or a pair"),
        (dict(drop=1.5), ValueError, "drop to be a finite number in"),
        (dict(prefix_tokens=-1), ValueError, "prefix_tokens >= 1, got -1"),
        (dict(num_slots=0), ValueError, "num_slots >= 1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WorkspaceMlp(E, 24, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: make_vit(block_fn=SmallBlock, mlp_layer=SwiGLU),
            TypeError,
            "got 'SwiGLU', in whose place",
        ),
        (lambda: make_vit(block_fn=functools.partial(SmallBlock, window_size=7)), TypeError, "no option 'window_size'"),
        (lambda: make_vit(block_fn=WorkspaceMlp), TypeError, "WorkspaceMlp"),
        (lambda: make_vit(mlp_layer=WorkspaceBlock), TypeError, "WorkspaceBlock"),
    ],
)
def test_wrong_classes_and_options_of_a_block_are_refused(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_causal_block_is_refused() -> None:
    with pytest.raises(ValueError, match="is_causal=False"):
        SmallBlock(E, 2)(torch.randn(1, 3, E), is_causal=True)


def test_an_attention_mask_reaches_timm_s_attention() -> None:
    block = SmallBlock(E, 2).eval()
    x = torch.randn(1, 3, E)
    alone = torch.eye(3, dtype=torch.bool).expand(1, 1, 3, 3)
    try:
        masked = block(x, attn_mask=alone)
    except TypeError:
        pytest.skip("timm's block takes no attn_mask")
    other = x.clone()
    other[:, 2] = torch.randn(E)
    assert torch.equal(block(other, attn_mask=alone)[:, :2], masked[:, :2]) and not torch.equal(masked, block(x))


def test_without_timm_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import ait\n"
        "for name in 'timm_layers', 'timm_models':\n"
        "    try: __import__(f'ait.integrations.{name}')\n"
        "    except ImportError as error: assert 'associative-transformer[timm]' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_ait_does_not_import_timm() -> None:
    subprocess.run([sys.executable, "-c", "import sys, ait; assert 'timm' not in sys.modules"], check=True)
