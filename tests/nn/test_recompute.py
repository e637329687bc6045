"""Activation checkpointing, of both kinds, changes no output, no gradient and no memory."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ait
from ait.nn.recompute import RECORDS_KEPT
from tests.nn.test_workspace import make_layer, weigh
from tests.tolerances import assert_close

REGIONS = ("layer", "block", "layer twice")
ORDERS = ("together", "first to last", "last to first")
INTERMEZZI = ("nothing", "eval", "other passes")


class Model(nn.Module):
    """A layer between two linear maps, one of which the checkpointed region may hold."""

    def __init__(self, region: str, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.region = region
        self.before, self.after = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(2))
        self.layer = make_layer(dtype=torch.float64, write_dropout=0.3, balance_weight=1.0, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        if self.region == "layer":
            return self.layer(x)
        if self.region == "block":
            return self.after(self.layer(self.before(x)))
        return self.layer(self.layer(self.before(x)))


Run = Callable[[nn.Module, Tensor], Tensor]


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def checkpointed_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=True)


def nested(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: checkpoint(model, y, use_reentrant=False), x, use_reentrant=False)


def nested_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: checkpoint(model, y, use_reentrant=True), x, use_reentrant=True)


def train(run: Run, model: Model, batches: list[Tensor], order: str, intermezzo: str) -> dict[str, Tensor]:
    """Two passes before their backward passes; everything that could differ, by name."""
    torch.manual_seed(1)
    batches = [batch.clone().requires_grad_() for batch in batches]
    with ait.balance_losses(model) as losses:
        outputs = [run(model, batch) for batch in batches]
    of_each = len(losses) // 2
    parts = [weigh(output) + sum(losses[i * of_each : (i + 1) * of_each]) for i, output in enumerate(outputs)]
    if intermezzo == "eval":
        model.eval()
    elif intermezzo == "other passes":
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(3, 5, 16, dtype=torch.float64))
    memory = model.layer.workspace.memory.gamma.clone()
    if order == "together":
        sum(parts).backward()
    else:
        for part in parts if order == "first to last" else reversed(parts):
            part.backward()
    assert torch.equal(model.layer.workspace.memory.gamma, memory), "a recompute wrote"
    result = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    result |= {f"gradient of batch {i}": batch.grad for i, batch in enumerate(batches)}
    result |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    result |= {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}
    return result | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_equal_runs(run: Run, model: Model, batches: list[Tensor], order: str, intermezzo: str) -> None:
    twin = copy.deepcopy(model)
    expected = train(plain, twin, batches, order, "nothing" if intermezzo == "eval" else intermezzo)
    actual = train(run, model, batches, order, intermezzo)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, name, dtype=torch.float64)


def two_batches(equal: bool) -> list[Tensor]:
    torch.manual_seed(2)
    first = torch.randn(3, 5, 16, dtype=torch.float64)
    return [first, first.clone() if equal else torch.randn(3, 5, 16, dtype=torch.float64)]


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
@pytest.mark.parametrize("region", REGIONS)
def test_checkpointing_changes_nothing(run: Run, semantics: str, region: str) -> None:
    """With two passes before one backward pass, also of equal batches, which contents cannot tell apart."""
    for order, intermezzo, equal in itertools.product(ORDERS, INTERMEZZI, (False, True)):
        assert_equal_runs(run, Model(region, semantics=semantics), two_batches(equal), order, intermezzo)


@pytest.mark.parametrize("run", [nested, nested_reentrant])
def test_nested_checkpointing_changes_nothing(run: Run) -> None:
    for order, equal in itertools.product(ORDERS, (False, True)):
        assert_equal_runs(run, Model("block"), two_batches(equal), order, "other passes")


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_checkpointing_over_many_steps_changes_nothing(run: Run) -> None:
    model, twin = Model("block"), Model("block")
    for step in range(3):
        x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
        for m, way in ((model, run), (twin, plain)):
            torch.manual_seed(step)
            (weigh(way(m, x)) + ait.balance_loss(m)).backward()
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.01 * p.grad
                    p.grad = None
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert_close(value, other, name, dtype=torch.float64)


def many_passes(run: Run, model: Model, batches: list[Tensor]) -> list[Tensor]:
    """As many passes as ``batches`` before one backward pass; the gradient of each batch."""
    batches = [batch.clone().requires_grad_() for batch in batches]
    sum(weigh(run(model, batch)) for batch in batches).backward()
    return [batch.grad for batch in batches]


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant, nested, nested_reentrant])
@pytest.mark.parametrize("equal", [False, True])
def test_as_many_passes_as_are_kept_before_one_backward_pass_get_their_own_gradients(run: Run, equal: bool) -> None:
    torch.manual_seed(2)
    batches = [torch.randn(3, 5, 16, dtype=torch.float64) for _ in range(1 if equal else RECORDS_KEPT)]
    batches = batches * RECORDS_KEPT if equal else batches
    model, twin = Model("block"), Model("block")
    torch.manual_seed(3)
    expected = many_passes(plain, twin, batches)
    torch.manual_seed(3)
    for i, grad in enumerate(many_passes(run, model, batches)):
        assert_close(grad, expected[i], f"gradient of batch {i}", dtype=torch.float64)


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant, nested, nested_reentrant])
@pytest.mark.parametrize("equal", [False, True])
def test_more_passes_than_are_kept_before_one_backward_pass_raise(run: Run, equal: bool) -> None:
    torch.manual_seed(2)
    batches = [torch.randn(3, 5, 16, dtype=torch.float64) for _ in range(RECORDS_KEPT + 1)]
    batches = batches[:1] * len(batches) if equal else batches
    with pytest.raises(RuntimeError, match="expected at most 64 forward passes of a layer between"):
        many_passes(run, Model("block"), batches)


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_passes_in_eval_count_among_those_kept(run: Run) -> None:
    for passes in (RECORDS_KEPT - 1, RECORDS_KEPT):
        model, x = Model("block"), two_batches(False)[0].requires_grad_()
        output = run(model, x)
        model.eval()
        with torch.no_grad():
            for _ in range(passes):
                model(x)
        model.train()
        if passes < RECORDS_KEPT:
            weigh(output).backward()
            assert x.grad is not None and x.grad.isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="expected at most 64 forward passes"):
                weigh(output).backward()


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_training_longer_than_the_records_reach_is_no_error(run: Run) -> None:
    model = Model("block")
    for _ in range(RECORDS_KEPT + 10):
        x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
        weigh(run(model, x)).backward()
        assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_recompute_of_other_tokens_gets_nan_instead_of_another_passs_memory(reentrant: bool, passes: int) -> None:
    model = Model("block")
    xs = [torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True) for _ in range(passes)]
    others = iter([*[0.0] * passes, *[1.0] * passes])

    def unsteady(x: Tensor) -> Tensor:
        return model(x + next(others) * torch.randn_like(x))

    sum(weigh(checkpoint(unsteady, x, use_reentrant=reentrant)) for x in xs).backward()
    assert all(x.grad is not None and x.grad.isnan().any() for x in xs)


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_a_layer_that_does_not_write_reads_what_it_had_read(run: Run) -> None:
    """Eval or frozen when the pass ran, and the memory moved before the backward pass."""
    for intermezzo in ("eval", "frozen"):
        results = []
        for way in (plain, run):
            model = Model("block")
            if intermezzo == "eval":
                model.eval()
            else:
                model.layer.workspace.frozen = True
            x = two_batches(False)[0].requires_grad_()
            output = way(model, x)
            model.train()
            model.layer.workspace.frozen = False
            with torch.no_grad():
                model(two_batches(False)[1])
            model.train(intermezzo != "eval")
            memory = model.layer.workspace.memory.gamma.clone()
            weigh(output).backward()
            assert torch.equal(model.layer.workspace.memory.gamma, memory)
            results.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_a_recompute_keeps_collects_and_counts_nothing(run: Run) -> None:
    model = Model("block")
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    poisoned = torch.full_like(x, torch.nan).requires_grad_()
    with ait.balance_losses(model) as losses:
        output = run(model, poisoned)
        output.sum().backward()
    assert len(losses) == 1 and model.layer.workspace.memory.skipped_updates == 1
    loss = model.layer.workspace._kept_loss.last
    assert loss is None or loss is losses[0]


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_loss_returned_from_the_region_gets_its_gradient_once(run: Run) -> None:
    layer, twin = (make_layer(balance_weight=1.0) for _ in range(2))

    class WithLoss(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x, return_aux=True)

    x = torch.randn(3, 5, 16, requires_grad=True)
    for m, way in ((layer, run), (twin, plain)):
        output, loss = way(WithLoss(m), x)
        (weigh(output) + loss).backward()
    for (name, p), q in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
        assert_close(p.grad, q[1].grad, name)


def test_masked_passes_are_recomputed_alike() -> None:
    x, mask = torch.randn(3, 5, 16, requires_grad=True), torch.rand(3, 5) < 0.3
    gradients = []
    for way in (True, False, None):
        layer = make_layer()
        output = layer(x, mask) if way is None else checkpoint(layer, x, mask, use_reentrant=way)
        layer(torch.randn(3, 5, 16))
        gradients.append(torch.autograd.grad(weigh(output), x)[0] if way is not True else None)
        if way is True:
            x.grad = None
            weigh(output).backward()
            gradients[-1] = x.grad
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[2])


def test_a_pass_inside_a_hook_of_a_backward_pass_is_new_where_nothing_like_it_ran() -> None:
    layer = make_layer()
    before = layer.workspace.memory.gamma.clone()
    x = torch.randn(2, 16, requires_grad=True)
    x.register_hook(lambda grad: layer(torch.randn(3, 5, 16)) and None)
    with pytest.raises(RuntimeError):
        (x * 2).sum().backward()
    assert not torch.equal(layer.workspace.memory.gamma, before)


def test_records_are_few_small_and_no_part_of_copies_and_pickles() -> None:
    layer = make_layer()
    for _ in range(RECORDS_KEPT + 10):
        checkpoint(layer, torch.randn(3, 5, 16), use_reentrant=False)
    records = layer.workspace._records.records
    assert len(records) == RECORDS_KEPT
    for record in records:
        tensors = [record.fingerprint, record.forward_pass.stored]
        assert sum(t.untyped_storage().nbytes() for t in tensors) <= 4 * (5 * 8 + 16)
        assert not any(t.requires_grad for t in tensors)
    assert not copy.deepcopy(layer).workspace._records.records
    assert not pickle.loads(pickle.dumps(layer)).workspace._records.records
    assert not any("record" in name for name in layer.state_dict())


def test_passes_that_nothing_recomputes_are_not_recorded() -> None:
    layer = make_layer()
    layer(torch.randn(3, 5, 16))
    assert not layer.workspace._records.records
    for reentrant in (False, True):
        checkpoint(layer, torch.randn(3, 5, 16, requires_grad=True), use_reentrant=reentrant)
    assert len(layer.workspace._records.records) == 2


def test_a_reentrant_region_that_turns_autograd_on_is_recomputed_all_the_same() -> None:
    def with_grad(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(torch.enable_grad()(model.forward), x, use_reentrant=True)

    for order, equal in itertools.product(ORDERS, (False, True)):
        assert_equal_runs(with_grad, Model("block"), two_batches(equal), order, "nothing")


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_plain_passes_in_between_leave_a_recompute_alone(run: Run) -> None:
    results = []
    for way in (plain, run):
        model, x = Model("block"), two_batches(False)[0].requires_grad_()
        torch.manual_seed(3)
        output = way(model, x)
        for _ in range(RECORDS_KEPT + 1):
            model(x.detach())
        weigh(output).backward()
        results.append(x.grad)
    assert_close(results[1], results[0])
