"""The balance loss: its two sums, and how a layer keeps it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from ait.nn.balance import balance_of, importance_and_load, squared_variation
from tests.nn.test_workspace import make_layer
from tests.tolerances import assert_close


def some_gates(heads: int = 2, slots: int = 3, k: int = 4, tokens: int = 9) -> tuple[Tensor, Tensor]:
    indices = torch.rand(heads * slots, tokens).topk(k).indices.sort().values
    return torch.softmax(torch.randn(heads * slots, k), dim=-1), indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_is_the_sum_and_load_the_number_of_a_tokens_gates(dtype: torch.dtype) -> None:
    gates, indices = some_gates()
    gates = gates.to(dtype)
    gates[1, 2] = 0
    indices[4, 3], gates[4, 3] = -1, 0
    expected = torch.zeros(2, 2, 9, dtype=torch.float64)
    for row in range(6):
        for gate, index in zip(gates[row], indices[row], strict=True):
            if index >= 0:
                expected[0, row // 3, index] += gate
                expected[1, row // 3, index] += gate > 0
    sums = importance_and_load(gates, indices, num_tokens=9, num_heads=2)
    assert sums.dtype == torch.float64
    assert_close(sums, expected)


def test_dense_and_sparse_gates_give_the_same_sums_and_gradients() -> None:
    gates, indices = some_gates()
    gates.requires_grad_()
    dense = torch.zeros(6, 9).scatter(1, indices, gates)
    sparse_sums = importance_and_load(gates, indices, 9, 2)
    dense_sums = importance_and_load(dense, None, 9, 2)
    assert torch.equal(sparse_sums, dense_sums), "both sums are exact"
    weights = torch.randn(2, 2, 9, dtype=torch.float64)
    weights[1] = 0
    (from_sparse,) = torch.autograd.grad((sparse_sums * weights).sum(), gates)
    (from_dense,) = torch.autograd.grad((dense_sums * weights).sum(), gates)
    assert torch.equal(from_sparse, from_dense)
    assert torch.equal(from_sparse, weights[0].repeat_interleave(3, 0).gather(1, indices).float())
    assert not torch.autograd.grad(importance_and_load(gates, indices, 9, 2)[1].sum() + gates.sum() * 0, gates)[0].any()


def defined_loss(gates: Tensor, seen: Tensor, heads: int, weight: float) -> Tensor:
    """The balance loss of dense gates ``(S*M, T)`` in float64, as its definition reads."""
    by_head = gates.double().unflatten(0, (heads, -1))[..., seen]
    importance, load = by_head.sum(1), (by_head > 0).double().sum(1)
    return weight * sum((v.var(-1) / (v.mean(-1) ** 2 + 1e-10)).sum() for v in (importance, load))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_loss_and_its_gradient_equal_the_definition(dtype: torch.dtype, masked: bool, way: str) -> None:
    gates, indices = some_gates()
    seen = torch.ones(9, dtype=torch.bool)
    if masked:
        seen[[0, 3]] = False
        lists = [row[seen[row]].tolist() for row in indices]
        indices = torch.tensor([row + [-1] * (4 - len(row)) for row in lists])
        gates = gates.masked_fill(indices < 0, 0)
    gates = gates.to(dtype).requires_grad_()
    dense = torch.zeros(6, 9, dtype=dtype).scatter_add(1, indices.clamp(min=0), gates)
    mask = ~seen if masked else None
    given = (gates, indices) if way == "sparse" else (dense, None)
    loss = balance_of(*given, mask, 9, 2, weight=0.3)
    expected = defined_loss(dense, seen, 2, weight=0.3)
    assert loss.dtype == dtype and loss.shape == ()
    assert_close(loss.detach(), expected.detach().to(dtype))
    (2 * loss).backward(inputs=gates, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(2 * expected, gates)
    real = indices >= 0
    assert gates.grad is not None
    assert_close(gates.grad[real], expected_grad[real])


def test_sums_do_not_depend_on_the_order_of_the_rows() -> None:
    gates, indices = some_gates(heads=1, slots=500, k=20, tokens=40)
    gates = torch.softmax(gates.double() + torch.rand(500, 20, dtype=torch.float64), dim=-1)
    order = torch.randperm(500)
    assert torch.equal(
        importance_and_load(gates, indices, 40, 1), importance_and_load(gates[order], indices[order], 40, 1)
    )


def test_non_finite_gates_stay_visible() -> None:
    gates, indices = some_gates()
    gates[0, 0] = torch.nan
    assert torch.isnan(importance_and_load(gates, indices, 9, 2)[0]).any()


@pytest.mark.parametrize("masked", [False, True])
def test_squared_variation_and_its_derivative_equal_the_definition(masked: bool) -> None:
    values = torch.rand(2, 3, 11, dtype=torch.float64).requires_grad_()
    mask = torch.arange(11) % 3 == 1 if masked else None
    seen = slice(None) if mask is None else ~mask
    expected = values[..., seen].var(-1, unbiased=True) / (values[..., seen].mean(-1) ** 2 + 1e-10)
    (expected_grad,) = torch.autograd.grad(expected.sum(), values)
    given = values.detach() if mask is None else values.detach().masked_fill(mask, 0)
    variation, scale, center = squared_variation(given, mask)
    assert_close(variation.squeeze(-1), expected.detach())
    assert_close((2 * (given - center) / scale)[..., seen], expected_grad[..., seen])


@pytest.mark.parametrize("tokens, mask", [(0, None), (1, None), (4, [True] * 4), (4, [True, True, False, True])])
def test_squared_variation_of_fewer_than_two_tokens_is_zero(tokens: int, mask: list[bool] | None) -> None:
    mask_tensor = None if mask is None else torch.tensor(mask)
    values = torch.rand(2, 3, tokens, dtype=torch.float64)
    if mask_tensor is not None:
        values = values.masked_fill(mask_tensor, 0)
    variation, scale, center = squared_variation(values, mask_tensor)
    assert torch.equal(variation, torch.zeros(2, 3, 1, dtype=torch.float64))
    assert torch.isfinite(center / scale).all()


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
