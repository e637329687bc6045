from __future__ import annotations

import pytest
from torch import nn

import ait
from ait.models import count_parameters


@pytest.mark.parametrize(("memory", "entries"), [("ewma", 20), ("fixed", 20), ("learned", 0)])
def test_memories_in_buffers_are_told_apart_from_parameters(memory: str, entries: int) -> None:
    layer = ait.GlobalWorkspaceLayer(8, num_slots=5, slot_dim=4, num_heads=2, memory=memory)
    count = count_parameters(nn.Sequential(layer, nn.BatchNorm1d(3)))
    assert count.memory_entries == entries
    assert count.parameters == sum(parameter.numel() for parameter in layer.parameters()) + 6
    assert count.total == count.parameters + entries


def test_frozen_parameters_count_and_shared_modules_count_once() -> None:
    linear = nn.Linear(3, 4).requires_grad_(False)
    assert count_parameters(nn.Sequential(linear, linear)) == (16, 0)
    layer = ait.GlobalWorkspaceLayer(8, num_slots=5, slot_dim=4, num_heads=2)
    assert count_parameters(nn.ModuleList([layer, layer])) == count_parameters(layer)
