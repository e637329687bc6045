"""Recordings of workspaces that were inserted into models of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ait
from tests.integrations.hosts import hf_vit, timm_convnext, timm_swin, timm_vit, torchvision_vit
from tests.integrations.small_hosts import FEW, bert, open_gates, sentences
from tests.recording.models import all_states, hook_count

VITS: list[tuple[Callable[[], nn.Module], int]] = [(timm_vit, 3), (torchvision_vit, 2), (hf_vit, 2)]


def logits(host: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = host(images)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
@pytest.mark.parametrize("make, depth", VITS, ids=["timm", "torchvision", "transformers"])
def test_inserted_workspaces_are_recorded_and_nothing_changes(
    make: Callable[[], nn.Module], depth: int, mode: Any
) -> None:
    results = []
    for recording in (False, True):
        torch.manual_seed(0)
        host = ait.insert_workspace(make(), mode=mode, **FEW).train()
        open_gates(host)
        before = hook_count(host)
        images = torch.randn(2, 3, 32, 32)
        if recording:
            with ait.record(host, attention=True, energy_steps=2) as trace:
                out = logits(host, images)
        else:
            out = logits(host, images)
        (out.square().mean() + ait.balance_loss(host)).backward()
        grads = {f"grad of {name}": p.grad for name, p in host.named_parameters() if p.grad is not None}
        results.append(grads | all_states(host) | {"logits": out.detach(), "random": torch.get_rng_state()})
        assert hook_count(host) == before
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key
    assert len(trace) == 1 and len(trace[0]) == depth and len(trace[0].attention) == depth
    layer = trace.layer(0)
    assert (layer.grid, layer.prefix_tokens, layer.tokens_per_image) == ((4, 4), 1, 17)
    assert layer.write is not None and layer.write.kept and float(layer.moved.min()) > 0
    assert layer.write.indices is not None and layer.write.indices.shape == (2, 4, 4)


@pytest.mark.parametrize("mode", ["wrap", "replace"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tokens_that_only_read_take_no_part_in_a_write_that_is_only_computed(training: bool, mode: Any) -> None:
    host = ait.insert_workspace(timm_vit(), mode=mode, prefix_tokens="out", **FEW).train(training)
    with torch.no_grad(), ait.record(host) as trace:
        host(torch.randn(2, 3, 32, 32))
    layer = trace.layer(0)
    assert layer.write is not None and layer.write.kept == training
    taken = layer.by_image(layer.write.load).sum((0, 1))
    assert float(taken[0]) == 0 < float(taken[1:].sum())
    assert layer.mask is not None and layer.by_image(layer.mask)[:, 0].all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_padding_of_a_text_model_takes_no_part_in_a_write_that_is_only_computed(training: bool) -> None:
    host = ait.insert_workspace(bert(), **FEW).train(training)
    inputs = sentences()
    with torch.no_grad(), ait.record(host) as trace:
        host(**inputs)
    layer = trace.layer(0)
    assert layer.write is not None and layer.mask is not None
    padding = inputs["attention_mask"].flatten() == 0
    assert torch.equal(layer.mask, padding)
    assert float(layer.write.load[:, padding].sum()) == 0 < float(layer.write.load.sum())


@pytest.mark.parametrize("make, grid", [(timm_swin, (16, 16)), (timm_convnext, (8, 8))], ids=["Swin", "ConvNeXt"])
def test_pyramids_are_recorded_with_the_grid_of_each_stage(
    make: Callable[[], nn.Module], grid: tuple[int, int]
) -> None:
    host = ait.insert_workspace(make(), **FEW).eval()
    with torch.no_grad(), ait.record(host) as trace:
        host(torch.randn(2, 3, 32, 32))
    assert trace.layer(0).grid == grid and trace.layer(0).prefix_tokens == 0
    assert trace.layer(-1).grid != grid
