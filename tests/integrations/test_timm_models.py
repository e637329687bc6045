"""``ait``'s models in timm's registry: the same models, with what timm's own can do."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from tests.tolerances import assert_close

timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")

from timm.data import resolve_data_config  # noqa: E402
from timm.models import _features as timm_features  # noqa: E402
from timm.models import group_parameters  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

from ait.integrations import timm_models  # noqa: E402
from ait.integrations.timm_interface import DropPathBlock, TimmAssociativeTransformer  # noqa: E402
from ait.nn.block import Block  # noqa: E402

TINY: dict[str, Any] = dict(
    img_size=(8, 12), patch_size=4, embed_dim=16, head_dim=8, depth=3, num_slots=4, slot_dim=8, workspace_heads=2
)
VIT_TINY: dict[str, Any] = dict(img_size=(8, 12), patch_size=4, embed_dim=16, head_dim=8, depth=3)
NAMES = [f"ait_{size}_patch4_32" for size in ("tiny", "small", "medium", "base")]
NAMES += [f"ait_{size}_patch16_224" for size in ("small", "medium", "base")]
NAMES += [name.replace("ait_", "ait_vit_") for name in NAMES]
RELEASE = tuple(int(number) for number in timm.__version__.split(".")[:3])
needs_getter = pytest.mark.skipif(
    not hasattr(timm_features, "FeatureGetterNet"), reason="this timm has no features_only for such models"
)


def make(name: str = "ait_tiny_patch4_32", **options: Any) -> Any:
    return timm.create_model(name, **{**(VIT_TINY if "vit" in name else TINY), **options})


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 12)


def train_step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (run(x).square().sum() + ait.balance_loss(model)).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return gradients


def test_all_are_listed() -> None:
    assert sorted(timm.list_models("ait_*")) == sorted(NAMES) == sorted(timm_models.__all__)
    assert timm.list_models("ait_*", pretrained=True) == [
        "ait_tiny_patch4_32.cifar10",
        "ait_vit_tiny_patch4_32.cifar10",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_each_has_the_tensors_of_ait_s_own(name: str) -> None:
    own = name.removeprefix("ait_") if "vit" in name else name
    size, patch, img_size = own.rsplit("_", 2)
    with torch.device("meta"):
        theirs = ait.create_model(
            size, img_size=int(img_size), patch_size=int(patch.removeprefix("patch")), num_classes=5
        ).state_dict()
        ours = timm.create_model(name, num_classes=5).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}


def test_defaults_are_those_of_the_name() -> None:
    model = timm.create_model("ait_tiny_patch4_32")
    assert (model.num_classes, model.in_chans, model.num_features, model.head_hidden_size) == (10, 3, 128, 64 * 128)
    with torch.device("meta"):
        assert timm.create_model("ait_small_patch16_224", embed_dim=64).num_classes == 1000


@pytest.mark.parametrize("kind", ["ait", "vit"])
def test_logits_gradients_and_memory_are_those_of_ait_s_own(kind: str) -> None:
    own = ait.create_model(f"{kind}_tiny", **(TINY if kind == "ait" else VIT_TINY))
    model = make("ait_tiny_patch4_32" if kind == "ait" else "ait_vit_tiny_patch4_32")
    model.load_state_dict(own.state_dict())
    x = images()
    torch.manual_seed(1)
    expected = own(x)
    torch.manual_seed(1)
    logits = model(x)
    assert torch.equal(logits, expected) and logits.shape == (4, 10)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), own.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    own.load_state_dict(model.state_dict())
    assert torch.equal(own.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["ait_tiny", "vit_tiny"])
def test_shipped_weights_load_and_say_how_images_are_normalised(name: str) -> None:
    variant = name.removeprefix("ait_")
    variant = f"ait_{variant}_patch4_32"
    for tagged in variant, f"{variant}.cifar10":
        model = timm.create_model(tagged, pretrained=True)
        own = ait.create_model(name, pretrained="cifar10")
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), own.state_dict().values(), strict=True)
        )
    config, data = ait.pretrained_config(f"{name}.cifar10"), resolve_data_config(model=model)
    assert (data["mean"], data["std"], data["input_size"]) == (config.mean, config.std, (3, 32, 32))
    assert model.default_cfg["num_classes"] == 10 and model.default_cfg["label_names"] == config.classes


def test_another_number_of_classes_keeps_the_pretrained_trunk() -> None:
    model = timm.create_model("ait_tiny_patch4_32", pretrained=True, num_classes=7)
    own = ait.create_model("ait_tiny", pretrained="cifar10").state_dict()
    assert model.head.weight.shape == (7, 64 * 128)
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items() if "head." not in key)
    headless = timm.create_model("ait_tiny_patch4_32", pretrained=True, num_classes=0)
    assert headless(torch.randn(2, 3, 32, 32)).shape == (2, 64 * 128)


def test_where_no_weights_exist_or_fit_pretrained_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for ait_small_patch4_32"):
        timm.create_model("ait_small_patch4_32", pretrained=True, depth=1, embed_dim=64)
    with pytest.raises(ValueError, match=r"do not fit this model.*patch_embed\.proj\.norm_in\.weight"):
        timm.create_model("ait_tiny_patch4_32", pretrained=True, in_chans=1)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 64)
    with pytest.raises(Exception, match=r"(?i)header|deserializ"):
        make(pretrained=True, pretrained_cfg_overlay=dict(file=str(broken)))


def test_a_file_of_one_s_own_loads_through_timm(tmp_path: Path) -> None:
    model, file = make(), tmp_path / "own.pth"
    torch.save(model.state_dict(), file)
    for loaded in make(pretrained=True, pretrained_cfg_overlay=dict(file=str(file))), make(checkpoint_path=str(file)):
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["ait_tiny_patch4_32", "ait_vit_tiny_patch4_32"])
@pytest.mark.parametrize(
    ("indices", "taken"), [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), ([0], [0]), ((0, -1), [0, 2]), ([-2], [1])]
)
def test_intermediates_are_the_blocks_outputs(name: str, indices: Any, taken: list[int]) -> None:
    model = make(name).eval()
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = images()
    features = model.forward_features(x)
    expected = outputs[:]
    final, maps = model.forward_intermediates(x, indices)
    assert torch.equal(final, features) and len(maps) == len(taken)
    for number, each in zip(taken, maps, strict=True):
        assert each.shape == (4, 16, 2, 3)
        assert torch.equal(each, expected[number].transpose(1, 2).reshape(4, 16, 2, 3))
    tokens = model.forward_intermediates(x, indices, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(each, expected[number]) for number, each in zip(taken, tokens, strict=True))
    normed = model.forward_intermediates(x, indices, norm=True, output_fmt="NLC", intermediates_only=True)
    assert all(
        torch.equal(each.flatten(1), model.head_norm(expected[number].flatten(1)))
        for number, each in zip(taken, normed, strict=True)
    )
    both = model.forward_intermediates(x, indices, output_dict=True, return_prefix_tokens=True)
    assert both.keys() == {"image_intermediates", "image_features"} and torch.equal(both["image_features"], features)
    assert model.forward_intermediates(x, indices, output_dict=True, intermediates_only=True).keys() == {
        "image_intermediates"
    }
    outputs.clear()
    final, early = model.forward_intermediates(x, indices, stop_early=True, output_fmt="NLC")
    assert len(outputs) == max(taken) + 1 and torch.equal(final, expected[max(taken)])
    assert all(torch.equal(a, b) for a, b in zip(early, tokens, strict=True))


def test_the_order_of_intermediates_is_that_of_the_blocks_as_in_timm() -> None:
    model = make().eval()
    x = images()
    first, last = model.forward_intermediates(x, [2, 0], intermediates_only=True)
    assert torch.equal(first, model.forward_intermediates(x, [0], intermediates_only=True)[0])
    assert torch.equal(last, model.forward_intermediates(x, [2], intermediates_only=True)[0])


@pytest.mark.parametrize("indices", [0, 4, [3], [-4], [], (0, 9)])
def test_blocks_that_do_not_exist_are_refused(indices: Any) -> None:
    model = make()
    for method in functools.partial(model.forward_intermediates, images()), model.prune_intermediate_layers:
        with pytest.raises(ValueError, match="expected indices"):
            method(indices=indices)
    assert len(model.blocks) == 3 and isinstance(model.head, nn.Linear)
    with pytest.raises(ValueError, match="output_fmt to be one of 'NCHW', 'NLC', got 'NHWC'"):
        model.forward_intermediates(images(), output_fmt="NHWC")


@needs_getter
@pytest.mark.parametrize("out_indices", [None, (0, 2), (0, 1), 1])
def test_features_only_gives_maps(out_indices: Any) -> None:
    options = {} if out_indices is None else {"out_indices": out_indices}
    backbone = make(features_only=True, **options).eval()
    taken = {None: [0, 1, 2], 1: [2]}.get(out_indices, out_indices)
    assert len(backbone.model.blocks) == max(taken) + 1 and isinstance(backbone.model.head, nn.Identity)
    assert backbone.feature_info.channels() == [16] * len(taken)
    assert backbone.feature_info.reduction() == [4] * len(taken)
    assert backbone.feature_info.module_name() == [f"blocks.{number}" for number in taken]
    whole = make().eval()
    whole.load_state_dict(backbone.model.state_dict(), strict=False)
    x = images()
    expected = whole.forward_intermediates(x, list(taken), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), expected, strict=True))


@needs_getter
def test_features_of_shipped_weights_and_of_shallow_models() -> None:
    backbone = timm.create_model("ait_tiny_patch4_32", pretrained=True, features_only=True, out_indices=[1]).eval()
    own = timm.create_model("ait_tiny_patch4_32", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(x)[0], own.forward_intermediates(x, [1], intermediates_only=True)[0])
    assert len(make(depth=2, features_only=True)(images())) == 2
    net = timm_features.FeatureGetterNet(make().eval(), out_indices=[0, 1], norm=True)
    assert [tuple(each.shape) for each in net(images())] == [(4, 16, 2, 3)] * 2
    assert isinstance(net.model.head_norm, nn.LayerNorm)


def test_features_only_needs_timm_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm_features, "FeatureGetterNet", raising=False)
    with pytest.raises(RuntimeError, match="features_only needs timm 1"):
        make(features_only=True)


def test_pruning_drops_blocks_norm_and_head() -> None:
    model = make().eval()
    x = images()
    expected = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    assert len(model.blocks) == 2 and isinstance(model.head_norm, nn.Identity) and model.num_classes == 0
    assert all(torch.equal(a, b) for a, b in zip(model.forward_intermediates(x)[1], expected, strict=True))
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match="head was not pruned"):
        model.reset_classifier(3, "flatten")
    kept = make()
    assert kept.prune_intermediate_layers(1, prune_head=False) == [2] and kept(x).shape == (4, 10)


def test_the_classifier_is_replaced_where_the_model_is() -> None:
    model = make(dtype=torch.float64)
    assert model.get_classifier() is model.head and model.head.out_features == 10
    model.reset_classifier(5)
    assert (model.num_classes, model.head.out_features, model.head.weight.dtype) == (5, 5, torch.float64)
    x = images().double()
    assert model(x).shape == (4, 5)
    model.reset_classifier(0)
    model.eval()
    assert model(x).shape == (4, 96) and model.head_hidden_size == 96
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), True))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x)) and model.head_hidden_size == 16
    with pytest.raises(ValueError, match="needs global_pool='flatten'"):
        model.reset_classifier(4)
    with pytest.raises(ValueError, match="got 'avg'"):
        model.reset_classifier(4, "avg")
    assert (model.num_classes, model.global_pool) == (0, "")
    model.reset_classifier(4, "flatten")
    assert model(x).shape == (4, 4)


def test_tokens_come_out_without_pooling() -> None:
    assert make(num_classes=0, global_pool="")(images()).shape == (4, 6, 16)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("ait_tiny_patch4_32", False), ("ait_tiny_patch4_32", True), ("ait_vit_tiny_patch4_32", False)],
)
def test_checkpointing_changes_no_gradient_and_no_memory(name: str, compiled: bool) -> None:
    model = make(name, depth=1 if compiled else 3)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    run = torch.compile(other, backend="aot_eager") if compiled else other
    for _ in range(2):
        x = images()
        steps = []
        for each, forward in (model, model), (other, run):
            torch.manual_seed(1)
            if "vit" in name:
                each.zero_grad()
                forward(x).square().sum().backward()
                steps.append({key: parameter.grad for key, parameter in each.named_parameters()})
            else:
                steps.append(train_step(each, forward, x))
        for key, gradient in steps[0].items():
            assert_close(steps[1][key], gradient, key)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    for enabled in True, False:
        model.set_grad_checkpointing(enabled)
        seen.clear()
        model(images()).sum().backward()
        assert len(seen) == 1 + enabled


def test_it_compiles_as_one_graph_and_learns_the_same() -> None:
    model = make(depth=1, write_dropout=0.0)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = images()
        gradients, expected = train_step(other, compiled, x), train_step(model, model, x)
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name], name)
        memories = (each.blocks[0].mlp.workspace.memory.gamma for each in (other, model))
        assert_close(*memories, "gamma")


def test_layer_decay_groups_patches_blocks_and_head() -> None:
    model = make()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    for name, layer in layers.items():
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else None
        assert layer == (block or (0 if name.startswith("patch_embed.") else 4)), name
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {p: (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert scale[parameter] == (0.5 ** (4 - layers[name]), 0.1 if parameter.ndim > 1 else 0.0), name


def test_a_learned_memory_is_not_decayed() -> None:
    assert make().no_weight_decay() == set()
    model = make(memory="learned")
    names = {f"blocks.{number}.mlp.workspace.memory.gamma" for number in range(3)}
    assert model.no_weight_decay() == names
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1)
    (undecayed,) = (group["params"] for group in optimizer.param_groups if group["weight_decay"] == 0)
    assert all(any(model.get_parameter(name) is parameter for parameter in undecayed) for name in names)


def test_training_with_timm_s_optimizer_lowers_the_loss_and_writes_the_memory() -> None:
    model = make(num_classes=4, drop_rate=0.1, drop_path_rate=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.01, layer_decay=0.8)
    x, labels = images(8), torch.arange(8) % 4
    before = [block.mlp.workspace.memory.gamma.clone() for block in model.blocks]
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        balance = ait.balance_loss(model)
        assert balance.requires_grad
        optimizer.zero_grad()
        (loss + balance).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(
        not torch.equal(block.mlp.workspace.memory.gamma, old) for block, old in zip(model.blocks, before, strict=True)
    )


def test_drop_path_rises_with_depth_and_acts_in_training_alone() -> None:
    model = make(drop_path_rate=0.4)
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    plain = make()
    plain.load_state_dict(model.state_dict())
    x = images()
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_drop_path_drops_the_residual_of_some_images_and_scales_the_rest(branch: str) -> None:
    block = Block(16, attn=nn.Linear(16, 16), mlp=nn.Linear(16, 16))
    other = block.mlp if branch == "attn" else block.attn
    assert other is not None
    other.requires_grad_(False)
    for parameter in other.parameters():
        parameter.zero_()
    dropping = DropPathBlock(block, 0.5)
    tokens = torch.randn(64, 6, 16)
    residual, out = block(tokens) - tokens, dropping(tokens) - tokens
    dropped = (out == 0).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    assert_close(out[~dropped], 2 * residual[~dropped])


def test_head_dropout_acts_in_training_alone() -> None:
    model = make(drop_rate=0.5)
    features = model.forward_features(images())
    assert (model.forward_head(features, pre_logits=True) == 0).float().mean() > 0.3
    model.eval()
    assert (model.forward_head(features, pre_logits=True) == 0).sum() == 0


def test_copies_and_pickles_compute_the_same() -> None:
    model = make(drop_path_rate=0.1)
    x = images()
    train_step(model, model, x)
    expected = model.eval()(x)
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(other(x), expected)


@pytest.mark.skipif(not hasattr(timm.models, "save_for_hf"), reason="this timm has no save_for_hf")
def test_a_saved_folder_is_loaded_by_name(tmp_path: Path) -> None:
    model = make(num_classes=5)
    timm.models.save_for_hf(model, tmp_path, model_args={**TINY, "num_classes": 5})
    if RELEASE < (1, 0, 12):
        pytest.skip("this timm has no local-dir:")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_saved_models_pass_between_timm_s_class_and_ait_s_own(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model, own = make(num_classes=5, drop_path_rate=0.2), ait.create_model("ait_tiny", **TINY)
    model.save_pretrained(tmp_path / "timm")
    own.save_pretrained(tmp_path / "own")
    x = images()
    again = TimmAssociativeTransformer.from_pretrained(tmp_path / "timm")
    assert torch.equal(again(x), model.eval()(x)) and again.blocks[2].drop_path.drop_prob == 0.2
    assert torch.equal(TimmAssociativeTransformer.from_pretrained(tmp_path / "own")(x), own.eval()(x))
    assert torch.equal(ait.AssociativeTransformer.from_pretrained(tmp_path / "timm")(x), again(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_slot=3), TypeError, "no option 'num_slot'; did you mean 'num_slots'"),
        (dict(qkv_bias=True), TypeError, "no option 'qkv_bias'"),
        (dict(question_dim=18), ValueError, "models that read a question come from ait.create_model"),
        (dict(global_pool="avg"), ValueError, "reads every token at its place"),
        (dict(global_pool=""), ValueError, "num_classes=0 with global_pool=''"),
        (dict(img_size=30), ValueError, "img_size divisible by patch_size=4"),
        (dict(drop_path_rate=1.0), ValueError, "drop_path_rate"),
        (dict(drop_rate=-0.1), ValueError, "drop_rate"),
    ],
)
def test_options_that_no_one_would_read_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_a_question_and_other_sizes_are_refused() -> None:
    model = make()
    assert isinstance(model, TimmAssociativeTransformer)
    with pytest.raises(ValueError, match="no question"):
        model(images(), torch.zeros(4, 18))
    with pytest.raises(ValueError, match=r"images of shape \(B, 3, 8, 12\)"):
        model(torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match="images of shape"):
        model.forward_intermediates(torch.randn(4, 1, 8, 12))
