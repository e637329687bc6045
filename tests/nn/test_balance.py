"""The balance loss: how a layer keeps it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from tests.nn.test_workspace import make_layer
from tests.tolerances import assert_close


class TwoLayers(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_layer(seed=seed, **arguments) for seed in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Wrapper(nn.Module):
    """As DistributedDataParallel and torch.compile wrap: the model is a submodule."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_balance_loss_sums_over_layers_through_wrappers() -> None:
    model, twin = TwoLayers(), TwoLayers()
    x = torch.randn(4, 7, 16)
    Wrapper(model)(x)
    y, first = twin.layers[0](x, return_aux=True)
    _, second = twin.layers[1](x + y, return_aux=True)
    assert first > 0 and second > 0
    assert torch.equal(ait.balance_loss(Wrapper(model)), first + second)
    assert torch.equal(ait.balance_loss(model), ait.balance_loss(Wrapper(model)))
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(ait.balance_loss(compiled), first + second)


def test_balance_loss_through_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, twin = TwoLayers(), TwoLayers()
        x = torch.randn(4, 7, 16)
        parallel = nn.parallel.DistributedDataParallel(model)
        for m in (parallel, twin):
            (m(x).square().sum() + ait.balance_loss(m)).backward()
    finally:
        torch.distributed.destroy_process_group()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, name)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_returned_and_kept_loss_are_one() -> None:
    layer = make_layer()
    _, loss = layer(torch.randn(4, 7, 16), return_aux=True)
    assert ait.balance_loss(layer) is loss
    assert loss.shape == () and loss.dtype == torch.float32


def test_weight_is_inside_and_zero_switches_the_loss_off() -> None:
    x = torch.randn(4, 7, 16)
    losses = [make_layer(balance_weight=w)(x, return_aux=True)[1] for w in (0.0, 0.5, 1.0)]
    assert losses[0] == 0 and not losses[0].requires_grad
    assert_close(losses[1] * 2, losses[2])


@pytest.mark.parametrize("case", ["eval", "frozen", "fixed", "learned", "released eval"])
def test_passes_without_a_training_write_keep_zero(case: str) -> None:
    layer = make_layer(
        memory=case if case in ("fixed", "learned") else "ewma",
        semantics="released" if case == "released eval" else "differentiable",
    )
    layer(torch.randn(4, 7, 16))
    layer.train("eval" not in case)
    ait.freeze_memory(layer, case == "frozen")
    _, loss = layer(torch.randn(4, 7, 16), return_aux=True)
    assert loss == 0 == ait.balance_loss(layer)


def test_each_pass_replaces_the_loss_of_the_last() -> None:
    layer = make_layer()
    layer(torch.randn(4, 7, 16))
    _, loss = layer(torch.randn(4, 7, 16), return_aux=True)
    assert ait.balance_loss(layer) is loss


@pytest.mark.parametrize("way", ["balance_loss", "return_aux", "autograd.grad"])
def test_loss_is_dropped_with_its_graph_once_back_propagated(way: str) -> None:
    layer = make_layer()
    x = torch.randn(4, 7, 16, requires_grad=True)
    y, loss = layer(x, return_aux=True)
    if way == "balance_loss":
        (y.sum() + ait.balance_loss(layer)).backward()
    elif way == "return_aux":
        (y.sum() + loss).backward()
    else:
        torch.autograd.grad(ait.balance_loss(layer), x)
    reference = weakref.ref(loss)
    del y, loss
    gc.collect()
    assert reference() is None, "nothing else may hold the graph"
    with pytest.raises(RuntimeError, match="balance_loss: expected a forward pass of the model"):
        ait.balance_loss(layer)


def test_a_backward_pass_drops_no_later_loss() -> None:
    layer = make_layer()
    y, loss = layer(torch.randn(4, 7, 16), return_aux=True)
    _, later = layer(torch.randn(4, 7, 16), return_aux=True)
    (y.sum() + loss).backward()
    assert ait.balance_loss(layer) is later


def test_balance_loss_before_any_pass_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="balance_loss: expected a forward pass of the model"):
        ait.balance_loss(TwoLayers())


def test_a_layer_that_was_skipped_does_not_count() -> None:
    model = TwoLayers()
    _, loss = model.layers[1](torch.randn(4, 7, 16), return_aux=True)
    assert torch.equal(ait.balance_loss(model), loss)


def test_balance_losses_collects_every_pass_inside_and_none_outside() -> None:
    model = TwoLayers()
    x = torch.randn(4, 7, 16)
    model(x)
    with ait.balance_losses(model) as losses:
        assert len(losses) == 0 and sum(losses) == 0
        model(x)
        inside = ait.balance_loss(model)
        assert len(losses) == 2
        model(x)
        with ait.balance_losses(model) as inner:
            model(x)
            assert len(inner) == 2
        assert len(losses) == 6
    model(x)
    assert len(losses) == 6 and len(inner) == 2
    assert torch.equal(losses[0] + losses[3], inside), "layer by layer, passes in order"
    assert inner[0] is losses[2] and inner[1] is losses[5]
    assert all(layer.workspace._kept_loss.collected is None for layer in model.layers)


def test_balance_losses_lets_go_after_an_error() -> None:
    model = TwoLayers()
    with pytest.raises(ZeroDivisionError), ait.balance_losses(model):
        _ = 1 / 0
    assert all(layer.workspace._kept_loss.collected is None for layer in model.layers)


def test_gradient_of_the_collected_losses_is_that_of_each_pass() -> None:
    x = torch.randn(4, 7, 16)
    layer, twin = (make_layer(balance_weight=10.0) for _ in range(2))
    with ait.balance_losses(layer) as losses:
        layer(x), layer(2 * x)
    sum(losses).backward()
    for scale in (1, 2):
        twin(scale * x, return_aux=True)[1].backward()
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            assert_close(p.grad, q.grad, name)
