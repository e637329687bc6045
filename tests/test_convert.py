"""The released checkpoints' converter: against the recorded layer, and against the release's model by its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ait
from ait.convert import convert_released, convert_released_layer
from ait.convert.released import BLOCK, LAYER, SHELL, regroup_heads
from ait.models import AssociativeTransformer
from ait.models.checkpoint import write_safetensors
from tests.nn.test_released import LAYER_TOLERANCE, STEPS, Recording, deviation, training_step
from tests.released_model import PREFIX, released_forward, released_shapes, released_state_dict
from tests.tolerances import assert_close

OPTIONS: dict[str, Any] = {"head_dim": 8, "top_k": 5, "beta": 0.5}
LAYER_0 = f"{PREFIX}0.1.fn."


def load(state: dict[str, Tensor], folder: Path, **options: Any) -> AssociativeTransformer:
    """The model of a released state dict, by way of a file."""
    config, converted, _ = convert_released(state, **{**OPTIONS, **options})
    write_safetensors(folder / "converted.safetensors", converted, config)
    return AssociativeTransformer.from_pretrained(folder / "converted.safetensors")


def recorded_model(recording: Recording) -> dict[str, Tensor]:
    """A released model whose first layer is the recorded one."""
    sizes = {"width": recording.dim, "hidden": recording.hidden, "slots": recording.slots,
             "slot_dim": recording.width, "heads": recording.heads}  # fmt: skip
    state = released_state_dict(**sizes)
    for name in LAYER:
        state[LAYER_0 + name] = recording[f"param.{name}"].clone()
    return state


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_converted_model_s_layer_repeats_the_recorded_steps(tmp_path: Path, name: str) -> None:
    recording = Recording(name)
    state = recorded_model(recording)
    load(state, tmp_path, top_k=recording.k, beta=recording.beta)
    model = AssociativeTransformer.from_pretrained(tmp_path / "converted.safetensors", write_dropout=0.0).train()
    layer = model.blocks[0].mlp
    assert isinstance(layer, ait.GlobalWorkspaceLayer)
    # The decay of the checkpoint is the release's float32 number, so these are closer than test_released's.
    closer = {"output": 1e-12, "memory": 1e-12}
    for step in range(STEPS):
        for what, (actual, expected) in training_step(layer, recording, step).items():
            assert deviation(actual, expected) <= closer.get(what, LAYER_TOLERANCE), f"step {step}: {what}"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_layer_alone_repeats_the_recorded_outputs(name: str) -> None:
    recording = Recording(name)
    released = {theirs: recording[f"param.{theirs}"] for theirs in LAYER}
    config, state, dropped = convert_released_layer(released, top_k=recording.k, beta=recording.beta)
    layer = ait.GlobalWorkspaceLayer(**config["arguments"], write_dropout=0.0)
    layer.load_state_dict(state)
    assert not dropped
    for step in range(STEPS):
        assert deviation(layer(recording[f"{step}.x"]), recording[f"{step}.y"]) <= LAYER_TOLERANCE
        assert deviation(layer.workspace.memory.gamma, recording[f"{step}.memory_after"]) <= LAYER_TOLERANCE


def test_without_the_regrouping_of_heads_the_recorded_outputs_are_missed() -> None:
    recording = Recording("a")
    released = {theirs: recording[f"param.{theirs}"] for theirs in LAYER}
    config, state, _ = convert_released_layer(released, top_k=recording.k, beta=recording.beta)
    state["workspace.writer.out.weight"] = released["memoryupdate.mha.fc.weight"]
    layer = ait.GlobalWorkspaceLayer(**config["arguments"], write_dropout=0.0)
    layer.load_state_dict(state)
    assert deviation(layer(recording["0.x"]), recording["0.y"]) > 1000 * LAYER_TOLERANCE


def test_regrouping_puts_column_d_s_where_s_d_stands_and_back() -> None:
    width, heads = 4, 3
    theirs = torch.arange(width * width * heads).view(width, width * heads)
    ours = regroup_heads(theirs, width, heads)
    for d in range(width):
        for s in range(heads):
            assert torch.equal(ours[:, s * width + d], theirs[:, d * heads + s])
    back = ours.view(width, heads, width).transpose(1, 2).flatten(1)
    assert torch.equal(back, theirs) and not torch.equal(ours, theirs)


@pytest.mark.parametrize("sizes", [{}, {"depth": 1, "heads": 1, "side": 1}, {"question": 18, "depth": 3, "patch": 1}])
def test_logits_and_memories_are_the_release_s_over_several_batches(tmp_path: Path, sizes: dict[str, Any]) -> None:
    state = released_state_dict(**sizes)
    model = load(state, tmp_path)
    assert not model.training
    generator = torch.Generator().manual_seed(1)
    size = sizes.get("side", 3) * sizes.get("patch", 2)
    for _ in range(3):
        inputs = [torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64)]
        if "question" in sizes:
            inputs.append(torch.randn(4, 18, generator=generator, dtype=torch.float64))
        expected = released_forward(state, *inputs, head_dim=8, k=5, beta=0.5)
        assert_close(model(*inputs), expected, "logits")
        for i, block in enumerate(model.blocks):
            expected_memory = state[f"{PREFIX}{i}.1.fn.memoryupdate.memory"]
            assert_close(block.mlp.workspace.memory.gamma, expected_memory, f"memory {i}")


@pytest.mark.parametrize("swap", ["qkv", "patches", "heads", "norms"])
def test_the_oracle_sees_tensors_in_a_wrong_place(tmp_path: Path, swap: str) -> None:
    state = released_state_dict()
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model = load(state, tmp_path)
    converted = model.state_dict()
    if swap == "qkv":
        name = "blocks.0.attn.qkv.weight"
        converted[name] = converted[name].view(3, 24, 24).flip(0).flatten(0, 1)
    elif swap == "patches":
        name = "patch_embed.proj.linear.weight"
        converted[name] = converted[name].view(24, 4, 3).transpose(1, 2).flatten(1)
    elif swap == "heads":
        name = "blocks.1.mlp.workspace.writer.out.weight"
        converted[name] = state[f"{PREFIX}1.1.fn.memoryupdate.mha.fc.weight"]
    else:
        first, second = "blocks.0.norm1.weight", "blocks.0.norm2.weight"
        converted[first], converted[second] = converted[second], converted[first]
    model.load_state_dict(converted)
    expected = released_forward(state, images, head_dim=8, k=5, beta=0.5)
    assert deviation(model(images), expected) > 1e-4


def test_the_tensors_tell_the_sizes() -> None:
    released = released_state_dict(
        depth=3, width=64, hidden=40, slots=7, slot_dim=4, heads=3, patch=4, side=2, classes=9, question=11
    )
    arguments = convert_released(released).config["arguments"]
    told = {"depth": 3, "embed_dim": 64, "hidden_dim": 40, "num_slots": 7, "slot_dim": 4, "workspace_heads": 3}
    told |= {"patch_size": 4, "img_size": 8, "num_classes": 9, "question_dim": 11}
    told |= {"alpha": 1 - float(torch.tensor(0.9))}
    defaults = {"in_chans": 3, "top_k": 512, "beta": 1.0, "head_dim": 64, "semantics": "released", "write_dropout": 0.1}
    expected = told | defaults
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize(("size", "depth", "total"), [("small", 2, 15_784_426), ("base", 12, 91_015_786)])
def test_a_checkpoint_of_the_published_size_leaves_the_109_056_unused_entries(
    size: str, depth: int, total: int
) -> None:
    shapes = released_shapes(
        depth=depth, width=768, hidden=3072, slots=32, slot_dim=32, heads=8, patch=4, side=8, classes=10
    )
    released = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if not name.endswith(".beta")}
    assert sum(tensor.numel() for tensor in released.values()) == total, "the authors' count"
    config, state, dropped = convert_released(released)
    assert sorted(dropped) == [
        "cls_token",
        "pos_embedding",
        "to_patch_embedding_cnn.0.bias",
        "to_patch_embedding_cnn.0.weight",
    ]
    assert sum(tensor.numel() for tensor in dropped.values()) == 109_056
    model = ait.create_model(f"ait_{size}", semantics="released", top_k=512, device="meta")
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert config["arguments"]["img_size"] == 32


def test_create_model_takes_what_was_converted(tmp_path: Path) -> None:
    sizes = {"depth": 3, "width": 128, "hidden": 512, "slots": 32, "slot_dim": 16, "heads": 3, "patch": 4, "side": 2}
    state = released_state_dict(dtype=torch.float32, **sizes)
    config, converted, _ = convert_released(state, head_dim=32, top_k=5, beta=0.5)
    write_safetensors(tmp_path / "out.safetensors", converted, config)
    by_file = ait.create_model("ait_tiny", pretrained=tmp_path / "out.safetensors").eval()
    by_hand = ait.create_model(
        "ait_tiny",
        img_size=8,
        num_classes=5,
        semantics="released",
        top_k=5,
        beta=0.5,
        alpha=config["arguments"]["alpha"],
    ).eval()
    by_hand.load_state_dict(converted)
    images = torch.randn(3, 3, 8, 8)
    logits = by_file(images)
    assert torch.equal(logits, by_hand(images))
    assert_close(logits, released_forward(state, images, head_dim=32, k=5, beta=0.5))


def test_every_name_stands_in_one_table_once() -> None:
    ours = [*SHELL.values(), *BLOCK.values()]
    assert len(set(ours)) == len(ours)
    model = AssociativeTransformer(depth=1, embed_dim=8, head_dim=8, img_size=4, question_dim=2, device="meta")
    expected = {name.removeprefix("blocks.0.") for name in model.state_dict()} - {
        "mlp.workspace.memory.skipped_updates"
    }
    assert set(ours) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"epoch": 3, "model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"net": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, "lr": 0.1},
    ],
)
def test_wrapped_checkpoints_are_unwrapped(wrap: Any) -> None:
    state = released_state_dict()
    expected = convert_released(state, **OPTIONS)
    found = convert_released(wrap(state), **OPTIONS)
    assert found.config == expected.config and found.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(tensor, expected.state_dict[name]) for name, tensor in found.state_dict.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_the_checkpoint_s_and_memories_have_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = released_state_dict(dtype=dtype)
    model = load(state, tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for i, block in enumerate(model.blocks):
        gamma = block.mlp.workspace.memory.gamma
        assert gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(gamma, state[f"{PREFIX}{i}.1.fn.memoryupdate.memory"].to(gamma.dtype))


def test_the_checkpoint_is_left_as_it_was() -> None:
    state = released_state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    convert_released(state, **OPTIONS)
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


def test_unknown_tensors_are_refused_by_name_or_dropped_on_request() -> None:
    state = released_state_dict() | {"new.weight": torch.ones(2), "transformer.norm.bias": torch.ones(1)}
    with pytest.raises(ValueError, match=r"also new\.weight, transformer\.norm\.bias; ignore_unknown=True \(--ignore"):
        convert_released(state, **OPTIONS)
    dropped = convert_released(state, ignore_unknown=True, **OPTIONS).dropped
    assert {"new.weight", "transformer.norm.bias", "pos_embedding"} <= set(dropped)


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}


WRONG: dict[str, tuple[Any, str]] = {
    "an optimiser": (lambda s: {"state": {}, "param_groups": []}, "that of an optimiser"),
    "empty": (lambda s: {}, "got an empty one"),
    "no tensors": (lambda s: {"epoch": 3, "lr": 0.1}, "entries that are no tensors: epoch, lr"),
    "tensors and numbers": (lambda s: s | {"epoch": 3}, "entries that are no tensors: epoch"),
    "another model": (lambda s: {"conv1.weight": torch.ones(1)}, "names such as transformer.*got conv1.weight"),
    "one layer": (lambda s: {"memoryupdate.memory": torch.ones(1)}, "one workspace layer, which convert_released_l"),
    "the release's ViT": (lambda s: s | {f"{PREFIX}0.1.fn.net.0.weight": torch.ones(1)}, "the release's ViT"),
    "projected Hopfield": (
        lambda s: s | {f"{LAYER_0}hopfield.association_core.in_proj_weight": torch.ones(1)},
        "an AiT whose Hopfield layer has projections of its own",
    ),
    "attention reader": (lambda s: s | {f"{LAYER_0}mha_hn.linear_q.weight": torch.ones(1)}, "reads by multi-head att"),
    "no self-attention": (lambda s: without(s, "0.fn."), r"none named transformer\.layers\.0\.0\.fn\.to_qkv\.weight"),
    "a block missing": (lambda s: without(s, "layers.0."), "expected blocks 0 to 0, got blocks 1"),
    "a tensor missing": (lambda s: without(s, "layers.1.1.fn.fc3.bias"), r"none named .*1\.1\.fn\.fc3\.bias"),
    "no head": (lambda s: without(s, "mlp_head"), r"none named mlp_head\.1\.weight"),
    "blocks of two sizes": (
        lambda s: s | {f"{PREFIX}1.1.fn.fc1.weight": torch.ones(9, 24)},
        "blocks of one size.*'hidden_dim': 48.*'hidden_dim': 9.* in block 1",
    ),
    "a shape": (
        lambda s: s | {f"{PREFIX}0.1.fn.memoryupdate.mha.fc.weight": torch.ones(8, 4)},
        r"writer.out.weight is \(8, 4\) in the weights and \(4, 8\) in the model",
    ),
    "too few dimensions": (lambda s: s | {"mlp_head.1.weight": torch.ones(5)}, r"mlp_head.1.weight of 2 dim.*\(5,\)"),
    "integers": (lambda s: s | {"mlp_head.1.bias": torch.ones(5, dtype=torch.int64)}, "floating-point dtype, got"),
    "patches not square": (
        lambda s: s | {"to_patch_embedding.1.weight": torch.ones(13)},
        r"square patches of 3 channels .* of 13 entries",
    ),
    "wide attention": (lambda s: s | {f"{PREFIX}0.0.fn.to_qkv.weight": torch.ones(24, 24)}, "72 rows of to_qkv, got"),
    "rows of w_qs": (lambda s: s | {f"{LAYER_0}memoryupdate.mha.w_qs.weight": torch.ones(7, 4)}, "multiple of 4 rows"),
    "not a square": (
        lambda s: s | {"mlp_head.0.weight": torch.ones(24 * 6)},
        "expected a square image, got a head on 144 entries, 6 tokens; img_size says",
    ),
    "decay": (lambda s: s | {f"{LAYER_0}memoryupdate.beta": torch.ones(2)}, r"one number in .*beta, got \(2,\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_is_refused_with_the_reason(wrong: str) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        convert_released(change(released_state_dict()), **OPTIONS)


def test_what_is_no_mapping_is_refused() -> None:
    for value in (torch.ones(1), [released_state_dict()], None):
        with pytest.raises(TypeError, match="expected a state dict, names and tensors, got"):
            convert_released(value)  # type: ignore[arg-type]


def test_images_that_are_not_square_are_told_by_their_size() -> None:
    state = released_state_dict(side=2)
    config = convert_released(state, img_size=(2, 8), **OPTIONS).config
    assert config["arguments"]["img_size"] == [2, 8]
    for img_size in ((2, 6), 6):
        with pytest.raises(ValueError, match=r"head_norm.weight is \(96,\) in the weights"):
            convert_released(state, img_size=img_size, **OPTIONS)
    grey = convert_released(released_state_dict(), in_chans=12, **OPTIONS).config["arguments"]
    assert (grey["patch_size"], grey["in_chans"], grey["img_size"]) == (1, 12, 3)


def test_a_wrong_layer_is_refused() -> None:
    released = {theirs: Recording("a")[f"param.{theirs}"] for theirs in LAYER}
    with pytest.raises(ValueError, match=r"none named fc3\.bias"):
        convert_released_layer(without(released, "fc3.bias"))
    with pytest.raises(ValueError, match="also gate"):
        convert_released_layer(released | {"gate": torch.ones(1)})
    assert list(convert_released_layer(released | {"gate": torch.ones(1)}, ignore_unknown=True).dropped) == ["gate"]
