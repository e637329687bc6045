"""Freezing and resetting all workspaces of a model, and what is said where there is none."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import ait
from tests.nn.test_workspace import make_layer


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("memory", ["ewma", "learned", "fixed"])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_freezing_and_unfreezing_restores_requires_grad_as_it_was(memory: str, semantics: str) -> None:
    model = nn.Sequential(make_layer(memory=memory, semantics=semantics), make_layer())
    if memory == "ewma":
        model[0].workspace.writer.key.weight.requires_grad_(False)  # the user's own choice
    before = flags(model)
    ait.freeze_memory(model)
    ait.freeze_memory(model)
    frozen = flags(model)
    assert not any(on for name, on in frozen.items() if ".writer." in name or ".memory." in name)
    assert all(frozen[name] == on for name, on in before.items() if ".writer." not in name and ".memory." not in name)
    ait.freeze_memory(model, frozen=False)
    ait.freeze_memory(model, frozen=False)
    assert flags(model) == before


def test_frozen_memory_is_read_and_not_written_in_training() -> None:
    layer = make_layer()
    before = layer.workspace.memory.gamma.clone()
    ait.freeze_memory(layer)
    assert "frozen" in repr(layer)
    x = torch.randn(4, 7, 16)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(layer.workspace.memory.gamma, before)
    assert torch.equal(y, layer.eval()(x))
    assert all(p.grad is None for p in layer.workspace.writer.parameters())
    assert all(p.grad is not None for p in layer.workspace.reader.parameters())
    ait.freeze_memory(layer.train(), False)
    layer(x)
    assert not torch.equal(layer.workspace.memory.gamma, before)


def test_a_frozen_model_thaws_after_deepcopy_and_pickle() -> None:
    layer = make_layer()
    before = flags(layer)
    ait.freeze_memory(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.workspace.frozen and flags(twin) == flags(layer)
        ait.freeze_memory(twin, False)
        assert flags(twin) == before


FUNCTIONS: dict[str, Any] = {
    "balance_loss": ait.balance_loss,
    "balance_losses": lambda model: ait.balance_losses(model).__enter__(),
    "freeze_memory": ait.freeze_memory,
    "reset_memory": ait.reset_memory,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_without_a_workspace_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a model with a GlobalWorkspace .*, got Linear without one"):
        FUNCTIONS[name](nn.Linear(2, 2))
    with pytest.raises(ValueError, match=rf"{name}: expected a torch.nn.Module, got dict"):
        FUNCTIONS[name]({})


@pytest.mark.parametrize("frozen", [1, None, "yes"])
def test_freeze_wants_a_bool(frozen: object) -> None:
    with pytest.raises(ValueError, match="freeze_memory: expected frozen to be True or False"):
        ait.freeze_memory(make_layer(), frozen)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1.5, "0", True, [1], 2**64, -(2**63) - 1])
def test_reset_wants_an_integer_a_generator_or_none(seed: object) -> None:
    layer = make_layer()
    before = layer.workspace.memory.gamma.clone()
    with pytest.raises(ValueError, match="reset_memory: expected seed to be an int"):
        ait.reset_memory(layer, seed)  # type: ignore[arg-type]
    assert torch.equal(layer.workspace.memory.gamma, before)


def test_workspaces_alone_and_inside_a_larger_model_are_found() -> None:
    layer = make_layer()
    for model in (layer, layer.workspace, nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), layer)})):
        ait.reset_memory(model, seed=1)
        ait.freeze_memory(model)
        ait.freeze_memory(model, False)
