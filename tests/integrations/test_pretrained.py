"""save_pretrained and from_pretrained of transformers: what comes back is what was saved, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ait
from tests.integrations.small_hosts import FEW, forward, open_gates, record_writes
from tests.integrations.transformers_hosts import CLASSES, build, inputs_of, transformers

pytestmark = pytest.mark.filterwarnings("ignore")
MODES = ("wrap", "parallel", "replace")


def saved(name: str, folder: Path, mode: Any = "wrap", layers: Any = (0, 2), **arguments: Any) -> Any:
    model = ait.insert_workspace(build(name), layers, mode=mode, **FEW, **arguments).train()
    forward(model, inputs_of(name))
    open_gates(model)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CLASSES)
def test_round_trip_is_bit_identical(name: str, mode: Any, tmp_path: Path) -> None:
    model = saved(name, tmp_path, mode)
    model_class = type(model)
    loaded = ait.with_workspace(model_class).from_pretrained(tmp_path)
    assert type(loaded) is model_class and not loaded.training
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key
    inputs = inputs_of(name)
    assert torch.equal(forward(loaded, inputs), forward(model, inputs))
    assert loaded.config.ait_workspace == model.config.ait_workspace
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_names_in_the_file_are_not_those_that_the_library_rewrites(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    rewritten = ("encoder.layer.", "attention.query", "attention.output.dense", "intermediate.dense", "output.dense")
    for mode in MODES:
        model = saved("ViT", tmp_path, mode)
        with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            names = {name.split("global_workspace.")[1] for name in list(file.keys()) if "global_workspace." in name}
        own = {name.split("global_workspace.")[1] for name in model.state_dict() if "global_workspace." in name}
        assert names == own
        assert not any(part in name for name in names for part in rewritten)


def test_memory_keeps_float32_in_a_half_precision_model(tmp_path: Path) -> None:
    model = saved("ViT", tmp_path)
    loaded = ait.with_workspace(type(model)).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for (_, one), (_, two) in zip(ait.workspaces(loaded), ait.workspaces(model), strict=True):
        assert one.gate.dtype == torch.bfloat16
        assert torch.equal(one.workspace.memory.gamma, two.workspace.memory.gamma)
    half = model.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = ait.with_workspace(type(model)).from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16)
    assert all(torch.equal(value, half.state_dict()[key]) for key, value in again.state_dict().items())


def test_sharded_checkpoints(tmp_path: Path) -> None:
    model = ait.insert_workspace(build("ViT"), **FEW)
    open_gates(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*"))) > 2
    loaded = ait.with_workspace(type(model)).from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_loading_information_and_auto_classes(tmp_path: Path) -> None:
    model = saved("ViT", tmp_path)
    loaded, information = ait.with_workspace(type(model)).from_pretrained(tmp_path, output_loading_info=True)
    assert not information["unexpected_keys"] and not information["missing_keys"]
    auto = ait.with_workspace(transformers().AutoModelForImageClassification).from_pretrained(tmp_path)
    inputs = inputs_of("ViT")
    for other in (loaded, auto):
        assert type(other) is type(model) and torch.equal(forward(other, inputs), forward(model, inputs))


def test_what_was_saved_without_workspaces_comes_back_without(tmp_path: Path) -> None:
    model = ait.remove_workspace(ait.insert_workspace(build("BERT"), **FEW))
    model.save_pretrained(tmp_path)
    assert "ait_workspace" not in json.loads((tmp_path / "config.json").read_text())
    loaded = ait.with_workspace(type(model)).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_the_class_itself_loads_the_bare_host(tmp_path: Path) -> None:
    model = saved("ViT", tmp_path)
    host = type(model).from_pretrained(tmp_path)
    ait.insert_workspace(host, **FEW)
    assert len(ait.workspaces(host)) == 3


def test_masks_work_after_loading(tmp_path: Path) -> None:
    model = saved("BERT", tmp_path, prefix_tokens=1)
    loaded = ait.with_workspace(type(model)).from_pretrained(tmp_path).train()
    masks = record_writes(loaded)
    inputs = inputs_of("BERT")
    forward(loaded, inputs)
    assert torch.equal(masks[0], (inputs["attention_mask"] == 0) | (torch.arange(9) < 1))


def test_a_workspace_in_a_part_of_a_model(tmp_path: Path) -> None:
    model = build("CLIP")
    ait.insert_workspace(model.vision_model, **FEW)
    open_gates(model)
    model.save_pretrained(tmp_path)
    load = ait.with_workspace(type(model)).from_pretrained
    if model.vision_model.config is not model.config.vision_config:
        with pytest.raises(ValueError, match="insert through the whole model, with layers="):
            load(tmp_path)
        return
    loaded = load(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert not hasattr(loaded.config, "ait_workspace")


def test_a_workspace_in_one_of_two_towers_through_the_whole_model(tmp_path: Path) -> None:
    model = ait.insert_workspace(build("CLIP"), slice(3, None), **FEW)
    open_gates(model)
    model.save_pretrained(tmp_path)
    loaded = ait.with_workspace(type(model)).from_pretrained(tmp_path)
    names = [name for name, _ in ait.workspaces(loaded)]
    assert len(names) == 3 and all(name.startswith("vision_model.") for name in names)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_config_that_speaks_of_other_workspaces_than_the_files(tmp_path: Path) -> None:
    model = saved("ViT", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    load = ait.with_workspace(type(model)).from_pretrained
    for change, match in (
        (dict(layers=[0]), "2 in the files and \\[0\\] in the config"),
        (dict(num_slots=5), r"of shape \(5, 8\)"),
        (dict(mode="replace"), "without it"),
        (dict(colour="red"), "got 'colour'"),
    ):
        path.write_text(json.dumps({**config, "ait_workspace": {**config["ait_workspace"], **change}}))
        with pytest.raises(ValueError, match=match):
            load(tmp_path)
    host = ait.remove_workspace(model)
    host.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a checkpoint with workspaces in it, got a config with 'ait_workspace'"):
        load(tmp_path / "bare")


def test_classes_that_load_nothing() -> None:
    with pytest.raises(ValueError, match="a class with from_pretrained, such as ViTModel, got Linear"):
        ait.with_workspace(torch.nn.Linear)
    with pytest.raises(ValueError, match="a class with from_pretrained, such as ViTModel, got an instance of ViTFor"):
        ait.with_workspace(build("ViT"))
