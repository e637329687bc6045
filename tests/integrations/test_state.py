"""What was added, as a file of its own: it goes round, fits only where it should, and runs no code."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from ait.integrations.state import ARGUMENTS_ENTRY, with_arguments
from tests.integrations.small_hosts import (
    FEW,
    assert_unchanged,
    bert,
    forward,
    images,
    open_gates,
    sentences,
    timm_model,
)

MODES = ("wrap", "parallel", "replace")


def save_pt(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "workspace.pt")
    return folder / "workspace.pt"


def save_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    pytest.importorskip("safetensors.torch").save_file(state, folder / "workspace.safetensors")
    return folder / "workspace.safetensors"


def trained(mode: Any = "wrap", **arguments: Any) -> nn.Module:
    model = ait.insert_workspace(timm_model(), mode=mode, **{**FEW, **arguments})
    open_gates(model)
    model.train()(images())
    return model.eval()


def host_of(model: nn.Module) -> nn.Module:
    """The same host without workspaces."""
    host = timm_model()
    host.load_state_dict(model.state_dict(), strict=False)
    return host


@pytest.mark.parametrize("mode", MODES)
def test_state_holds_what_was_added_and_nothing_else(mode: Any) -> None:
    model = timm_model()
    before = set(model.state_dict())
    ait.insert_workspace(model, mode=mode, **FEW)
    state = ait.workspace_state_dict(model)
    assert set(state) - {ARGUMENTS_ENTRY} == set(model.state_dict()) - before
    for name, value in state.items():
        if name != ARGUMENTS_ENTRY:
            assert torch.equal(value, model.state_dict()[name]) and not value.requires_grad
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("save", [save_pt, save_safetensors])
@pytest.mark.parametrize("mode", MODES)
def test_a_bare_host_gets_workspaces_as_the_file_says(mode: Any, save: Callable[..., Path], tmp_path: Path) -> None:
    model = trained(mode, layers=[1], beta=2.0, steps=3, prefix_tokens="out", selection_dtype=torch.bfloat16)
    path = save(ait.workspace_state_dict(model), tmp_path)
    host = host_of(model)
    if mode != "replace":
        assert not torch.equal(host(images()), model(images()))
    generator = torch.get_rng_state()
    assert ait.load_workspace(host, path) is host
    assert torch.equal(torch.get_rng_state(), generator), "nothing is drawn"
    x = images()
    assert torch.equal(host(x), model(x))
    assert str(ait.workspaces(host)[0][1]) == str(ait.workspaces(model)[0][1])
    assert host.state_dict().keys() == model.state_dict().keys()
    assert all(p.requires_grad for p in ait.workspaces(host)[0][1].parameters())
    again = ait.load_workspace(host, path)
    assert torch.equal(again(x), model(x))


def test_names_of_blocks_and_wrappers_may_differ(tmp_path: Path) -> None:
    model = trained(layers=[0, 1])
    path = save_pt(ait.workspace_state_dict(nn.Sequential(model)), tmp_path)
    host = ait.load_workspace(host_of(model), path)
    x = images()
    assert torch.equal(host(x), model(x))


def test_it_goes_round_in_a_text_encoder_and_in_half_precision(tmp_path: Path) -> None:
    model = ait.insert_workspace(bert(), **FEW)
    host = copy.deepcopy(model)
    ait.remove_workspace(host)
    open_gates(model)
    path = save_pt(ait.workspace_state_dict(model), tmp_path)
    inputs = sentences()
    assert torch.equal(forward(ait.load_workspace(host, path), inputs), forward(model, inputs))
    half = ait.load_workspace(bert().to(torch.bfloat16), path)
    for (_, one), (_, two) in zip(ait.workspaces(half), ait.workspaces(model), strict=True):
        assert one.gate.dtype == torch.bfloat16 and one.workspace.memory.gamma.dtype == torch.float32
        assert torch.equal(one.workspace.memory.gamma, two.workspace.memory.gamma)


def test_models_of_this_package_work_too(tmp_path: Path) -> None:
    first, second = (ait.create_model("ait_tiny", img_size=8, patch_size=4, num_classes=2) for _ in range(2))
    path = save_pt(ait.workspace_state_dict(first), tmp_path)
    ait.load_workspace(second, path)
    theirs = ait.workspace_state_dict(first)
    assert all(torch.equal(value, theirs[name]) for name, value in ait.workspace_state_dict(second).items())
    with pytest.raises(ValueError, match="does not say how to insert them"):
        ait.load_workspace(timm_model(), path)


MISMATCHED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": (dict(layers=[0]), r"layers=\[0, 1\] as in the model .*got layers=\[0\] in"),
    "mode": (dict(mode="parallel"), "mode='wrap' as in the model .*got mode='parallel' in"),
    "option": (dict(beta=2.0), "the default beta as in the model .*got beta=2.0 in"),
    "prefix": (dict(prefix_tokens="out"), "prefix_tokens='in' as in the model .*got prefix_tokens='out' in"),
    "slots": (dict(num_slots=5), "num_slots=4 as in the model .*got num_slots=5 in"),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_file_for_other_arguments_says_which(name: str) -> None:
    arguments, match = MISMATCHED[name]
    state = ait.workspace_state_dict(trained(**arguments))
    model = trained()
    refuses(model, state, match)


def refuses(model: nn.Module, source: Any, match: str, error: type[Exception] = ValueError) -> None:
    def load() -> None:
        with pytest.raises(error, match=match):
            ait.load_workspace(model, source)

    assert_unchanged(model, load)


GATE = "blocks.1.global_workspace.gate"
GAMMA = "blocks.1.global_workspace.workspace.memory.gamma"
ALTERED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda state: state.pop(GATE), f"'{GATE}' in the state dict, got .* entries without it"),
    "more": (lambda state: state.update(head=torch.zeros(2)), "workspaces alone .* got 1 others, such as 'head'"),
    "shape": (lambda state: state.update({GATE: torch.zeros(3)}), rf"'{GATE}' of shape \(1,\).*got \(3,\)"),
    "kind": (lambda state: state.update({GATE: torch.zeros(1, dtype=torch.int64)}), "got .*int64"),
    "NaN": (lambda state: state.update({GATE: torch.full((1,), torch.nan)}), f"finite numbers in '{GATE}'"),
    "infinity": (lambda state: state.update({GAMMA: torch.full((4, 8), torch.inf)}), "got infinity or NaN"),
    "sparse": (lambda state: state.update({GAMMA: torch.eye(4, 8).to_sparse()}), "to be an ordinary tensor"),
    "no tensor": (lambda state: state.update({GATE: 1.0}), "names and tensors in the state dict, got .*float"),
    "no name": (lambda state: state.update({3: torch.zeros(1)}), "names and tensors in the state dict, got 3"),
}


@pytest.mark.parametrize("target", ["same workspaces", "bare host"])
@pytest.mark.parametrize("name", ALTERED)
def test_altered_state_says_where(name: str, target: str) -> None:
    alter, match = ALTERED[name]
    state: dict[Any, Any] = ait.workspace_state_dict(trained())
    alter(state)
    refuses(trained() if target == "same workspaces" else timm_model(), state, match)


def as_json(**arguments: Any) -> bytes:
    return json.dumps({"arguments": {"layers": [0, 1], "mode": "wrap", **arguments}, "layers": {}}).encode()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\xff\xfe", "as JSON"),
        (b"[1]", "as JSON"),
        (b'{"arguments": 3, "layers": {}}', "as JSON"),
        (b"[" * 100_000, "as JSON"),
        (as_json(os="system"), "got 'os'"),
        (as_json(layers="x"), "layers 'all'"),
        (as_json(mode=[]), "mode to be one of"),
        (as_json(selection_dtype="load"), "selection_dtype"),
    ],
)
def test_altered_arguments(content: bytes, match: str) -> None:
    state = ait.workspace_state_dict(trained())
    state[ARGUMENTS_ENTRY] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    refuses(timm_model(), state, match)


def test_sizes_that_the_tensors_do_not_have_cost_no_memory() -> None:
    state = ait.workspace_state_dict(trained())
    del state[ARGUMENTS_ENTRY]
    arguments = {"layers": [0, 1], "mode": "wrap", "num_slots": 10**9, "slot_dim": 10**6}
    layers = {f"blocks.{i}.global_workspace": i for i in range(2)}
    refuses(timm_model(), with_arguments(state, arguments, layers), "of shape .*1000000000")


def test_a_host_that_is_too_short_or_too_narrow() -> None:
    state = ait.workspace_state_dict(trained())
    refuses(timm_model(depth=1), state, r"different integers from -1 to 0.*inserting as the state dict says")
    refuses(timm_model(embed_dim=16), state, r"of shape \(16,\)")


class Executes:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_file_runs_no_code(form: str, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "workspace.pt"
    content = {GATE: Executes(target)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for model in (trained(), timm_model()):
        refuses(model, path, "expected a whole file of a workspace .*; it was not unpickled, got")
    assert not target.exists()
    if form == "zip":
        torch.load(path, weights_only=False)
        assert target.exists(), "it would have"


@pytest.mark.parametrize("save", [save_pt, save_safetensors])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped header"])
def test_a_corrupted_file(damage: str, save: Callable[..., Path], tmp_path: Path) -> None:
    model = trained()
    path = save(ait.workspace_state_dict(model), tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "text":
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        content[:40] = bytes(40)
    path.write_bytes(content)
    for target in (model, timm_model()):
        refuses(target, str(path), "load_workspace: expected a whole file of a workspace")


def test_files_that_are_none(tmp_path: Path) -> None:
    model = trained()
    refuses(model, tmp_path / "nothing.pt", "does not exist", FileNotFoundError)
    refuses(model, tmp_path, r"expected a file of a workspace \(folders of save_pretrained are read by ait.with_work")
    torch.save(model, tmp_path / "model.pt")
    refuses(timm_model(), tmp_path / "model.pt", r"torch.save of ait.workspace_state_dict\(model\).*was not executed$")
    torch.save([1, 2], tmp_path / "list.pt")
    refuses(model, tmp_path / "list.pt", "a state dict in the file, got .* with list")


def test_without_arguments_names_and_shapes_decide() -> None:
    model, other = trained(), trained()
    state = ait.workspace_state_dict(model)
    del state[ARGUMENTS_ENTRY]
    ait.load_workspace(other, state)
    assert torch.equal(other.blocks[0].global_workspace.gate, model.blocks[0].global_workspace.gate)
    refuses(timm_model(), state, r"does not say how to insert them \(insert as in its model, .*got a bare Vision")
    refuses(other, model.state_dict(), r"\(a whole model's go into model.load_state_dict\), got 32 others, such as")


def test_models_without_workspace() -> None:
    with pytest.raises(ValueError, match="workspace_state_dict: expected a model with a workspace"):
        ait.workspace_state_dict(timm_model())
