"""balance_loss: its two sums, its value and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ait.ops.reference as reference
from ait.ops.balance_loss import balance_of
from ait.ops.reference import importance_and_load, squared_variation
from tests.ops.common import LAYOUTS, THREADS, assert_same_bits, needs_kernels, num_threads
from tests.tolerances import assert_close

GATES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


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


# Heads, slots, entries and tokens: several threads, odd sizes, one of each, tokens that nobody lists, nothing of each.
SHAPES = [(8, 32, 64, 256), (3, 5, 7, 37), (1, 1, 1, 1), (2, 3, 4, 900), (2, 3, 0, 5), (2, 0, 4, 5), (2, 3, 0, 0)]


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, masked: bool = False) -> tuple[Tensor, ...]:
    """Gates, some of them 0, indices and mask."""
    heads, slots, k, tokens = shape
    mask = torch.rand(tokens) < 0.3 if masked else torch.zeros(tokens, dtype=torch.bool)
    order = torch.rand(heads * slots, tokens).masked_fill(mask, -1).topk(k)
    indices = torch.where(order.values >= 0, order.indices, tokens).sort().values
    indices[indices == tokens] = -1
    gates = torch.softmax(4 * torch.randn(heads * slots, k, dtype=dtype), dim=-1)
    return gates.masked_fill((indices < 0) | (torch.rand(indices.shape) < 0.1), 0), indices, mask


def defined_loss(gates: Tensor, indices: Tensor, mask: Tensor, heads: int, weight: float) -> Tensor:
    """In float64, as the definition reads, gate by gate."""
    dense = torch.zeros(gates.shape[0], mask.shape[0], dtype=torch.float64)
    dense = dense.scatter_add(1, indices.clamp(min=0), gates.double().masked_fill(indices < 0, 0))
    by_head = dense.unflatten(0, (heads, -1))[..., ~mask]
    importance, load = by_head.sum(1), (by_head > 0).double().sum(1)
    return weight * sum((v.var(-1) / (v.mean(-1) ** 2 + 1e-10)).sum() for v in (importance, load))


@GATES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_loss_and_gradient_equal_the_definition(shape: tuple, dtype: torch.dtype, masked: bool, layout: str) -> None:
    gates, indices, mask = sample(shape, dtype, masked)
    given = LAYOUTS[layout](gates).requires_grad_()
    loss = balance_of(given, LAYOUTS[layout](indices), mask if masked else None, shape[3], shape[0], weight=0.3)
    (grad,) = torch.autograd.grad(2 * loss, given)
    gates.requires_grad_()
    expected = defined_loss(gates, indices, mask, shape[0], weight=0.3)
    (expected_grad,) = torch.autograd.grad(2 * expected, gates)
    assert loss.dtype == dtype and loss.shape == ()
    assert_close(loss.detach(), expected.detach().to(dtype), "loss")
    assert_close(grad, expected_grad, "gradient")


@GATES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_reference(shape: tuple, dtype: torch.dtype, masked: bool) -> None:
    gates, indices, mask = sample(shape, dtype, masked)
    args = gates, indices, mask if masked else None, shape[3], shape[0], 0.7
    loss, slope = torch.ops.ait.balance_loss(*args)
    expected_loss, expected_slope = reference.balance_loss(*args)
    assert_close(loss, expected_loss, "loss")
    assert_close(slope, expected_slope, "slope")
    grad = torch.tensor(0.4, dtype=dtype)
    grad_gates = torch.ops.ait.balance_loss_backward(grad, gates, indices, slope)
    assert_close(grad_gates, reference.balance_loss_backward(grad, gates, indices, slope), "gradient")


@pytest.mark.parametrize("masked", [False, True])
def test_dense_gates_give_the_loss_and_gradient_of_listed_ones(masked: bool) -> None:
    gates, indices, mask = sample((2, 3, 4, 9), torch.float64, masked)
    gates.requires_grad_()
    dense = torch.zeros(6, 9, dtype=torch.float64).scatter_add(1, indices.clamp(min=0), gates)
    losses = [balance_of(*given, mask if masked else None, 9, 2, 1.0) for given in ((gates, indices), (dense, None))]
    assert_close(losses[0], losses[1], "loss")
    sparse_grad, dense_grad = (torch.autograd.grad(loss, gates)[0] for loss in losses)
    assert_close(sparse_grad, dense_grad.masked_fill(indices < 0, 0), "gradient")


@needs_kernels
def test_same_bits_for_every_number_of_threads() -> None:
    gates, indices, _ = sample((8, 32, 256, 3000))
    gates.requires_grad_()
    results = []
    for threads in THREADS:
        with num_threads(threads):
            loss = balance_of(gates, indices, None, 3000, 8, 1.0)
            results.append((loss.view(1), *torch.autograd.grad(loss, gates)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@needs_kernels
def test_loss_and_slope_do_not_depend_on_the_order_of_the_rows() -> None:
    gates, indices, _ = sample((1, 500, 20, 40), torch.float64)
    order = torch.randperm(500)
    results = [
        torch.ops.ait.balance_loss(g, i, None, 40, 1, 1.0)
        for g, i in ((gates, indices), (gates[order], indices[order]))
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_nan_gates_give_a_loss_of_nan() -> None:
    gates, indices, _ = sample((2, 3, 4, 9))
    gates[1, 2] = torch.nan
    assert balance_of(gates, indices, None, 9, 2, 1.0).isnan()


def test_double_backward_is_an_error() -> None:
    gates, indices, _ = sample((2, 3, 4, 9))
    gates.requires_grad_()
    (grad,) = torch.autograd.grad(balance_of(gates, indices, None, 9, 2, 1.0), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="balance_loss: double backward is not implemented"):
        grad.sum().backward()


def test_forward_mode_autograd_is_an_error_and_not_a_lost_tangent() -> None:
    gates, indices, _ = sample((2, 3, 4, 9))
    with pytest.raises(NotImplementedError, match="balance_loss: forward-mode autograd is not implemented"):
        torch.func.jvp(lambda g: balance_of(g, indices, None, 9, 2, 1.0), (gates,), (gates,))


@needs_kernels
def test_what_would_leave_memory_is_an_error() -> None:
    gates, indices, _ = sample((2, 3, 4, 9))
    op, grad, slope = torch.ops.ait.balance_loss, torch.tensor(1.0), torch.zeros(2, 9)
    beyond = indices.clone()
    beyond[4, 3] = 9
    with pytest.raises(RuntimeError, match="expected indices below 9, got something else in head 1"):
        op(gates, beyond, None, 9, 2, 1.0)
    with pytest.raises(RuntimeError, match="expected indices below 9, got something else in head 1"):
        torch.ops.ait.balance_loss_backward(grad, gates, beyond, slope)
    with pytest.raises(RuntimeError, match=r"expected indices of shape \(6, 4\), got \(6, 3\)"):
        op(gates, indices[:, :3], None, 9, 2, 1.0)
    with pytest.raises(RuntimeError, match="expected indices of dtype Long, got Int"):
        op(gates, indices.int(), None, 9, 2, 1.0)
    with pytest.raises(RuntimeError, match="expected gates of dtype float32 or float64, got Half"):
        op(gates.half(), indices, None, 9, 2, 1.0)
    with pytest.raises(RuntimeError, match="num_heads of at least 1 that divides 6 rows, got 9 and 4"):
        op(gates, indices, None, 9, 4, 1.0)
    with pytest.raises(RuntimeError, match=r"expected mask of shape \(9\), got \(8\)"):
        op(gates, indices, torch.zeros(8, dtype=torch.bool), 9, 2, 1.0)
    with pytest.raises(RuntimeError, match="expected mask of dtype Bool, got Float"):
        op(gates, indices, torch.zeros(9), 9, 2, 1.0)
    with pytest.raises(RuntimeError, match="expected slope of dtype Float, got Double"):
        torch.ops.ait.balance_loss_backward(grad, gates, indices, slope.double())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    gates, indices, mask = sample((2, 3, 4, 9), masked=True)
    args = gates.requires_grad_(requires_grad), indices, mask, 9, 2, 0.5
    torch.library.opcheck(torch.ops.ait.balance_loss.default, args)
    backward = torch.ops.ait.balance_loss_backward.default
    tests = ("test_schema", "test_faketensor")
    args = torch.tensor(1.0), gates.detach(), indices, torch.randn(2, 9)
    torch.library.opcheck(backward, args, test_utils=tests)
