"""inject_balance_loss: the gradients of ``loss + balance_loss``, for whoever calls ``loss.backward()`` alone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ait
from tests.nn.test_workspace import make_layer
from tests.tolerances import assert_close

WEIGHT = 1.0  # so that the balance loss' gradient is of the size of the other


class Model(nn.Module):
    """Two layers between linear maps; where ``way`` says so, each layer is checkpointed."""

    def __init__(self, way: str = "plain", dtype: torch.dtype = torch.float64, **arguments: Any) -> None:
        super().__init__()
        self.way = way
        options = {"write_dropout": 0.3, "balance_weight": WEIGHT, **arguments}
        self.layers = nn.ModuleList(make_layer(seed=seed, dtype=dtype, **options) for seed in (0, 1))
        self.before, self.head = nn.Linear(16, 16, dtype=dtype), nn.Linear(16, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = x + (layer(x) if self.way == "plain" else checkpoint(layer, x, use_reentrant=self.way == "reentrant"))
        return self.head(x.mean(1))


def batches(number: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 7, 16, generator=generator, dtype=dtype), torch.tensor([0, 1, 2, 0]))] * number


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, twin: nn.Module, without: nn.Module | None = None) -> None:
    """Those of ``model`` are those of ``twin``, and were not without the balance loss, as in ``without``."""
    actual, expected = gradients(model), gradients(twin)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(actual[name], grad, name)
    for (name, value), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(value, other) or torch.allclose(value, other, rtol=1e-5), name
    if without is not None:
        plain = gradients(without)
        assert any(not torch.allclose(expected[name], plain[name], rtol=1e-2) for name in plain)


Step = Callable[[nn.Module, Callable[[], Tensor]], Any]


def assert_injection_equals_the_sum(model: nn.Module, step: Step, scale: Callable[[], float] | None = None) -> None:
    """``step(model, balance)`` adds ``balance()`` to its loss: nothing with injection, the balance loss without."""
    twin, without = copy.deepcopy(model), copy.deepcopy(model)
    for m, balance in (
        (twin, lambda: ait.balance_loss(twin)),
        (without, lambda: torch.zeros((), dtype=torch.float64)),
    ):
        torch.manual_seed(1)
        expected = step(m, balance)
    with ait.inject_balance_loss(model, scale):
        torch.manual_seed(1)
        actual = step(model, lambda: torch.zeros((), dtype=torch.float64))
    assert torch.equal(actual, expected), "outputs are not changed"
    assert_same_gradients(model, twin, without)


def one_step(model: nn.Module, balance: Callable[[], Tensor]) -> Tensor:
    (x, y) = batches(1)[0]
    logits = model(x)
    (F.cross_entropy(logits, y) + balance()).backward()
    return logits.detach()


@pytest.mark.parametrize("way", ["plain", "not reentrant", "reentrant"])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_gradients_and_memory_are_those_of_the_sum(way: str, semantics: str) -> None:
    assert_injection_equals_the_sum(Model(way, semantics=semantics), one_step)


@pytest.mark.parametrize("way", ["plain", "not reentrant", "reentrant"])
def test_two_passes_before_one_backward_pass_count_once_each(way: str) -> None:
    (x, y) = batches(1)[0]

    def step(model: nn.Module, balance: Callable[[], Tensor]) -> Tensor:
        first = model(x)
        loss = F.cross_entropy(first, y) + balance()
        second = model(x.flip(0) * 2)
        (loss + F.cross_entropy(second, y) + balance()).backward()
        return first.detach() + second.detach()

    assert_injection_equals_the_sum(Model(way), step)


@pytest.mark.parametrize("way", ["plain", "not reentrant", "reentrant"])
def test_scale_stands_for_accumulation_and_for_the_gradient_scaler(way: str) -> None:
    """timm's order of things: forward, loss over the steps, scaled, backward; then unscaled."""
    accumulate = 3
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(model: nn.Module, balance: Callable[[], Tensor]) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for x, y in batches(accumulate):
            logits = model(x)
            scaler.scale((F.cross_entropy(logits, y) + balance()) / accumulate).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return logits.detach()

    assert_injection_equals_the_sum(Model(way), step, scale=lambda: scaler.get_scale() / accumulate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_are_those_of_the_sum(dtype: torch.dtype) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    model = Model(dtype=torch.float32)
    twin = copy.deepcopy(model)
    (x, y) = batches(1, torch.float32)[0]
    with ait.inject_balance_loss(model, scaler.get_scale):
        for m in (model, twin):
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype):
                logits = m(x)
            loss = F.cross_entropy(logits.float(), y)
            scaler.scale(loss + (ait.balance_loss(twin) if m is twin else 0)).backward()
    assert_same_gradients(model, twin)


def test_one_backward_pass_asks_for_the_scale_once() -> None:
    model, calls = Model(), []

    def scale() -> float:
        calls.append(None)
        return 1.0

    with ait.inject_balance_loss(model, scale):
        for steps in (1, 2):
            one_step(model, lambda: torch.zeros(()))
            assert len(calls) == steps


@pytest.mark.parametrize("returned", [2, 2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), 0])
def test_scale_multiplies_the_balance_loss(returned: Any) -> None:
    model = Model()
    twin = copy.deepcopy(model)
    with ait.inject_balance_loss(model, lambda: returned):
        torch.manual_seed(1)
        one_step(model, lambda: torch.zeros(()))
    torch.manual_seed(1)
    one_step(twin, lambda: float(returned) * ait.balance_loss(twin))
    assert_same_gradients(model, twin)


@pytest.mark.parametrize(
    "returned",
    [float("nan"), float("inf"), -1.0, torch.tensor(float("nan")), torch.ones(2), torch.tensor(1), "1", None],
)
def test_a_scale_that_is_none_is_an_error_in_the_backward_pass(returned: Any) -> None:
    model = Model()
    with (
        ait.inject_balance_loss(model, lambda: returned),
        pytest.raises(ValueError, match="inject_balance_loss: expected scale to return a finite number of at least 0"),
    ):
        one_step(model, lambda: torch.zeros(()))


def test_a_second_backward_pass_through_the_same_forward_pass_adds_nothing() -> None:
    """Two losses of one output, back-propagated one after the other, as if their sum were."""
    model = Model()
    twin = copy.deepcopy(model)
    (x, y) = batches(1)[0]
    with ait.inject_balance_loss(model):
        torch.manual_seed(1)
        logits = model(x)
        F.cross_entropy(logits, y).backward(retain_graph=True)
        logits.square().sum().backward()
    torch.manual_seed(1)
    logits = twin(x)
    (F.cross_entropy(logits, y) + logits.square().sum() + ait.balance_loss(twin)).backward()
    assert_same_gradients(model, twin)


class Several(nn.Module):
    """Outputs as Hugging Face's models have them: a dict with the loss computed inside, logits, hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        logits = self.model(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits, "hidden_states": (logits * 2,)}


@pytest.mark.parametrize("read", ["loss", "logits", "both"])
def test_it_counts_once_whatever_of_the_output_is_used(read: str) -> None:
    def step(model: nn.Module, balance: Callable[[], Tensor]) -> Tensor:
        out = model(*batches(1)[0])
        loss = out["logits"].square().sum() if read == "logits" else out["loss"]
        if read == "both":
            loss = loss + out["hidden_states"][0].sum() + out["logits"].square().sum()
        (loss + balance()).backward()
        return out["logits"].detach()

    assert_injection_equals_the_sum(Several(), step)


def test_outputs_may_be_changed_in_place() -> None:
    layer = make_layer(balance_weight=WEIGHT)
    with ait.inject_balance_loss(layer):
        for module in (layer, layer.workspace):
            module(torch.randn(4, 7, 16)).mul_(2).sum().backward()
    assert layer.workspace.writer.key.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["eval", "no_grad", "frozen", "weight 0"])
def test_passes_without_a_balance_loss_get_none(mode: str) -> None:
    model = Model(balance_weight=0.0 if mode == "weight 0" else WEIGHT)
    if mode == "eval":
        model.eval()
    if mode == "frozen":
        ait.freeze_memory(model)
    (x, _) = batches(1)[0]

    def scale() -> float:
        raise AssertionError("nobody should ask")

    handle = ait.inject_balance_loss(model, scale)
    with torch.set_grad_enabled(mode != "no_grad"):
        out = model(x)
    assert out.requires_grad == (mode != "no_grad")
    if out.requires_grad:
        out.sum().backward()
    assert (handle.last_loss() == 0) == (mode != "no_grad")


def test_a_forward_pass_that_is_never_back_propagated_leaves_nothing() -> None:
    model = Model()
    hooks = []

    def hang_on_the_graph(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        def hook(grad: Tensor) -> None: ...

        output.register_hook(hook)
        hooks.append(weakref.ref(hook))

    watch = model.before.register_forward_hook(hang_on_the_graph)
    with ait.inject_balance_loss(model):
        out = model(batches(1)[0][0])
        assert hooks[0]() is not None
        del out
        gc.collect()
        assert hooks[0]() is None, "the graph is gone"
        watch.remove()
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        one_step(model, lambda: torch.zeros(()))
    torch.manual_seed(1)
    one_step(twin, lambda: ait.balance_loss(twin))
    assert_same_gradients(model, twin)


def test_removal_ends_it_and_gives_balance_loss_back() -> None:
    model = Model()
    handle = ait.inject_balance_loss(model)
    assert handle.active
    handle.remove()
    handle.remove()
    assert not handle.active
    with pytest.raises(RuntimeError, match="balance_loss: expected a forward pass"):
        ait.balance_loss(model)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        torch.manual_seed(1)
        one_step(m, lambda m=m: ait.balance_loss(m))
    assert_same_gradients(model, twin)
    with ait.inject_balance_loss(model) as again:
        handle.remove()
        assert again.active, "an old handle does not end a new injection"


@pytest.mark.parametrize("way", ["plain", "not reentrant", "reentrant"])
def test_a_pass_keeps_what_it_began_with(way: str) -> None:
    """Removed after the forward pass it still adds; injected after it, it does not."""
    (x, y) = batches(1)[0]
    for begins_with_injection in (True, False):
        model = Model(way)
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        if begins_with_injection:
            with ait.inject_balance_loss(model, lambda: 2.0):
                logits = model(x)
            F.cross_entropy(logits, y).backward()
        else:
            loss = F.cross_entropy(model(x), y) + 2.0 * ait.balance_loss(model)
            with ait.inject_balance_loss(model):
                loss.backward()
        torch.manual_seed(1)
        (F.cross_entropy(twin(x), y) + 2.0 * ait.balance_loss(twin)).backward()
        assert_same_gradients(model, twin)


def test_last_loss_is_that_of_the_last_pass_without_gradient() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    with ait.inject_balance_loss(model, lambda: 3.0) as handle:
        with pytest.raises(RuntimeError, match="expected a forward pass of the model before last_loss"):
            handle.last_loss()
        for m in (model, twin):
            torch.manual_seed(1)
            m(batches(1)[0][0])
        assert not handle.last_loss().requires_grad
        assert torch.equal(handle.last_loss(), ait.balance_loss(twin).detach())
        _, loss = model.layers[0](torch.randn(4, 7, 16, dtype=torch.float64), return_aux=True)
        assert loss > 0 and not loss.requires_grad


def test_mixing_with_balance_loss_is_an_error_both_ways() -> None:
    model = Model()
    with ait.inject_balance_loss(model.layers[0]):
        model(batches(1)[0][0])
        with pytest.raises(RuntimeError, match="balance_loss: expected a model without injected balance loss"):
            ait.balance_loss(model)
        with pytest.raises(RuntimeError, match="balance_losses: expected a model without"), ait.balance_losses(model):
            pass
    with ait.balance_losses(model), pytest.raises(RuntimeError, match=r"got a call inside ait\.balance_losses"):
        ait.inject_balance_loss(model)


def test_injecting_twice_is_an_error_and_the_first_stays() -> None:
    model = Model()
    with ait.inject_balance_loss(model.layers[1]) as handle:
        with pytest.raises(RuntimeError, match="expected a model without injected balance loss, got one that has it"):
            ait.inject_balance_loss(model)
        assert handle.active and model.layers[0].workspace._kept_loss.injection is None


@pytest.mark.parametrize("scale", [0.5, torch.ones(()), "1"])
def test_a_scale_that_cannot_be_called_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="expected scale to be callable or None"):
        ait.inject_balance_loss(Model(), scale)


def test_a_model_without_a_workspace_is_refused() -> None:
    with pytest.raises(ValueError, match="inject_balance_loss: expected a model with a GlobalWorkspace"):
        ait.inject_balance_loss(nn.Linear(2, 2))


def test_float16_without_a_scale_is_an_error_before_anything_is_written() -> None:
    with pytest.raises(RuntimeError, match=r"expected scale=.*got None with parameters in float16"):
        ait.inject_balance_loss(make_layer().half())
    layer = make_layer()
    before = layer.workspace.memory.gamma.clone()
    x = torch.randn(4, 7, 16)
    with ait.inject_balance_loss(layer):
        for cast in (True, False):
            with (
                torch.autocast("cpu", torch.float16, enabled=cast),
                pytest.raises(RuntimeError, match="autocast to float16" if cast else "tokens in float16"),
            ):
                layer(x) if cast else layer.workspace(x.half())
        assert torch.equal(layer.workspace.memory.gamma, before)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).sum().backward()
        with torch.autocast("cpu", torch.float16):
            layer.eval()(x)
    with ait.inject_balance_loss(layer.half().train(), lambda: 128.0):
        layer(x.half()).sum().backward()


def test_copies_and_pickles_come_without_it_and_state_dicts_do_not_know_it() -> None:
    model = Model()
    names = list(model.state_dict())
    with ait.inject_balance_loss(model, lambda: 1.0) as handle:
        assert list(model.state_dict()) == names
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin(batches(1)[0][0])
            assert ait.balance_loss(twin) > 0
        assert handle.active


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_passes_add_it_with_the_scale_of_the_moment(backend: str) -> None:
    model = Model(dtype=torch.float32, write_dropout=0.0)
    twin = copy.deepcopy(model)
    scale = [1.0]
    handle = ait.inject_balance_loss(model, lambda: scale[0])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for scale[0] in (1.0, 4.0):
        for m, run in ((model, compiled), (twin, twin)):
            m.zero_grad()
            for x, y in batches(2, torch.float32):
                loss = F.cross_entropy(run(x), y)
                (loss if m is model else loss + scale[0] * ait.balance_loss(twin)).backward()
        assert_same_gradients(model, twin)
    handle.remove()
    model.zero_grad(), twin.zero_grad()
    for run in (compiled, twin):
        F.cross_entropy(run(batches(1, torch.float32)[0][0]), batches(1)[0][1]).backward()
    assert_same_gradients(model, twin)


def test_a_handle_an_epoch_compiles_once_and_asks_its_own_scale() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    layer = make_layer(dtype=torch.float32, balance_weight=WEIGHT, write_dropout=0.0)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = batches(1, torch.float32)[0][0]
    # A limit of its own: importing timm's optimisers raises it to a million.
    with torch._dynamo.config.patch(recompile_limit=4):
        for epoch in range(6):
            layer.zero_grad(), twin.zero_grad()
            with ait.inject_balance_loss(layer, scale=lambda factor=float(epoch): factor):
                compiled(x).square().mean().backward()
            (twin(x).square().mean() + epoch * ait.balance_loss(twin)).backward()
            assert_same_gradients(layer, twin)
    assert counter.frame_count == 1


def test_a_compiled_backward_pass_after_the_handle_is_gone_says_so() -> None:
    model = Model(dtype=torch.float32)
    handle = ait.inject_balance_loss(model)
    loss = torch.compile(model, backend="aot_eager")(batches(1, torch.float32)[0][0]).sum()
    handle.remove()
    del handle
    gc.collect()
    with pytest.raises(RuntimeError, match="inject_balance_loss: expected the handle to live"):
        loss.backward()


def train_on_one_rank(rank: int, store: str, folder: str) -> None:
    """One step of DistributedDataParallel on the rank's own images: with injection, and with the sum."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result = {}
    for way in ("injected", "sum", "alone"):
        model = Model("not reentrant", write_dropout=0.0)
        x, y = batches(1)[0]
        x = x * (rank + 1)
        if way == "injected":
            ait.inject_balance_loss(model)
        runs = model if way == "alone" else nn.parallel.DistributedDataParallel(model)
        loss = F.cross_entropy(runs(x), y)
        (loss if way == "injected" else loss + ait.balance_loss(runs)).backward()
        result[way] = gradients(model)
    torch.distributed.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")


def test_processes_average_its_gradient_like_any_other(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_one_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    names = ranks[0]["alone"].keys()
    for result in ranks:
        assert result["injected"].keys() == result["sum"].keys() == names
        for name in names:
            assert_close(result["injected"][name], result["sum"][name], name)
            assert_close(result["injected"][name], (ranks[0]["alone"][name] + ranks[1]["alone"][name]) / 2, name)
