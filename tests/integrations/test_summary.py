"""What workspaces(model) tells."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ait
from ait.integrations import InsertedWorkspace
from tests.integrations.small_hosts import FEW, timm_model


def test_it_is_a_sequence_of_names_and_modules() -> None:
    model = ait.insert_workspace(timm_model(depth=3), [0, 2], **FEW)
    found = ait.workspaces(model)
    assert len(found) == 2
    assert [name for name, _ in found] == ["blocks.0.global_workspace", "blocks.2.global_workspace"]
    assert found[-1][1] is model.blocks[2].global_workspace
    assert all(isinstance(module, InsertedWorkspace) for _, module in found[:])
    assert repr(found) == "Workspaces(['blocks.0.global_workspace', 'blocks.2.global_workspace'])"
    assert ait.workspaces(nn.Sequential(model))[0][0] == "0.blocks.0.global_workspace"


@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
@pytest.mark.parametrize("reader", ["hopfield", "attention"])
def test_costs_are_what_was_added(mode: str, reader: str) -> None:
    model = timm_model()
    before, x = ait.count_parameters(model).total, torch.randn(1, 3, 32, 32)
    flops = []
    for _ in range(2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        flops.append(counter.get_total_flops())
        if len(flops) == 1:
            ait.insert_workspace(model, mode=mode, reader=reader, **FEW)
    costs = ait.workspaces(model).costs()
    assert sum(cost.parameters for cost in costs) == ait.count_parameters(model).total - before
    # PyTorch does not count what happens between tokens and slots: our operator, and attention on CPU. It does count
    # the projections of the memory, and the sum by which a recompute would know these tokens.
    width = 16 if reader == "attention" else 32
    between = 17 * 4 * 4 * width
    projections = 2 * 4 * 8 * 32
    fingerprint = 2 * 17 * 32
    for cost in costs:
        assert cost.write_flops == 2 * 2 * 4 * 32
    expected = sum(17 * cost.read_flops - between + projections + fingerprint for cost in costs)
    assert flops[1] - flops[0] == expected


def test_summary_tells_layers_parameters_operations_and_gates() -> None:
    model = ait.insert_workspace(timm_model(), **FEW)
    with torch.no_grad():
        model.blocks[1].global_workspace.gate.fill_(0.125)
    lines = ait.workspaces(model).summary(tokens=17).splitlines()
    added = sum(p.numel() for p in model.blocks[0].global_workspace.parameters()) + 4 * 8
    assert lines[0].split("  ")[0] == "layer" and "FLOPs of 17 tokens" in lines[0]
    assert lines[1].split() == [
        *("0", "blocks.0.global_workspace", "Block", "wrap"),
        *(f"+{added:,}", f"+{17 * 4 * 4 * 32:,}", f"+{17 * 2 * 2 * 4 * 32:,}", "0"),
    ]
    assert lines[2].split()[-1] == "0.125"
    assert lines[3].split()[:2] == ["total", f"+{2 * added:,}"]
    total = ait.count_parameters(model).total
    assert lines[4] == (
        f"model: {total - 2 * added:,} parameters without, {total:,} with "
        f"(+{2 * added:,}, {2 * added / (total - 2 * added):+.2%}; memory entries included)"
    )


def test_summary_of_a_model_that_was_built_with_workspaces() -> None:
    model = ait.create_model("ait_tiny", img_size=8, patch_size=4, num_classes=2)
    lines = ait.workspaces(model).summary().splitlines()
    assert len(lines) == 1 + 3 + 2
    assert "built in" in lines[1] and "FLOPs a token" in lines[0]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="workspaces: expected a model with a workspace in it"):
        ait.workspaces(timm_model())
    with pytest.raises(ValueError, match="tokens"):
        ait.workspaces(ait.insert_workspace(timm_model(), **FEW)).summary(tokens=0)
