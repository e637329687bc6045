"""The memory: its dtype, its rows, what is stored and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import ait
from ait.nn.memory import Memory
from tests.nn.test_workspace import make_layer
from tests.tolerances import assert_close


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["ewma", "learned", "fixed"])
def test_memory_is_a_buffer_unless_it_is_learned(kind: str) -> None:
    memory = Memory(5, 8, kind, unit_rows=True)
    assert ("gamma" in dict(memory.named_buffers())) == (kind != "learned")
    assert ("gamma" in dict(memory.named_parameters())) == (kind == "learned")
    assert set(memory.state_dict()) == {"gamma", "skipped_updates"}


def test_rows_start_gaussian_from_the_generator_and_of_unit_norm_where_asked() -> None:
    unit, free = (Memory(500, 8, "ewma", unit_rows=u, generator=generator()).gamma for u in (True, False))
    assert_close(torch.linalg.vector_norm(unit, dim=-1), torch.ones(500))
    assert_close(unit, free / torch.linalg.vector_norm(free, dim=-1, keepdim=True))
    assert abs(free.mean()) < 0.05 and abs(free.std() - 1) < 0.05
    assert torch.equal(free, Memory(500, 8, "fixed", unit_rows=False, generator=generator()).gamma)


CONVERSIONS = {
    "half": (lambda m: m.half(), torch.float32, torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.float32, torch.bfloat16),
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.float32, torch.bfloat16),
    "to(device, half)": (lambda m: m.to("cpu", torch.float16), torch.float32, torch.float16),
    "double": (lambda m: m.double(), torch.float64, torch.float64),
    "double, float": (lambda m: m.double().float(), torch.float32, torch.float32),
    "double, half": (lambda m: m.double().half(), torch.float32, torch.float16),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("kind", ["ewma", "learned", "fixed"])
def test_memory_has_at_least_float32_through_conversions_and_loses_no_bit(conversion: str, kind: str) -> None:
    convert, memory_dtype, weight_dtype = CONVERSIONS[conversion]
    layer = make_layer(memory=kind)
    if kind == "learned":
        layer(torch.randn(4, 7, 16)).sum().backward()
    before = layer.workspace.memory.gamma.detach().clone()
    layer = convert(layer)
    gamma = layer.workspace.memory.gamma
    assert gamma.dtype == memory_dtype and layer.fc1.weight.dtype == weight_dtype
    assert torch.equal(gamma.detach().float(), before)
    assert isinstance(gamma, torch.nn.Parameter) == (kind == "learned")
    assert gamma.grad is None or gamma.grad.dtype == memory_dtype
    assert layer.workspace.memory.skipped_updates.dtype == torch.int64
    assert layer(torch.randn(4, 7, 16, dtype=weight_dtype)).dtype == weight_dtype


@pytest.mark.parametrize(
    "dtype, memory_dtype",
    [
        (None, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_constructor_dtype_is_that_of_the_parameters(dtype: torch.dtype | None, memory_dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    assert layer.workspace.memory.gamma.dtype == memory_dtype
    assert {p.dtype for p in layer.parameters()} == {dtype or torch.float32}


@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_state_dict_round_trip_is_bit_for_bit_and_training_goes_on_alike(semantics: str) -> None:
    layer = make_layer(semantics=semantics)
    for _ in range(3):
        layer(torch.randn(4, 7, 16))
    layer(torch.full((4, 7, 16), torch.nan))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make_layer(seed=9, semantics=semantics)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.workspace.memory.gamma, layer.workspace.memory.gamma)
    assert other.workspace.memory.skipped_updates == 1
    x = torch.randn(4, 7, 16)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.workspace.memory.gamma, layer.workspace.memory.gamma)


def test_half_precision_checkpoint_loads_into_float32_memory() -> None:
    layer = make_layer()
    halved = {name: value.half() if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    layer.load_state_dict(halved)
    assert layer.workspace.memory.gamma.dtype == torch.float32


@pytest.mark.parametrize("kind", ["ewma", "learned", "fixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_has_float32_where_a_half_precision_checkpoint_is_assigned(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(memory=kind)
    state = layer.state_dict()
    given = {name: value.to(dtype) if name.endswith("gamma") else value for name, value in state.items()}
    layer.load_state_dict(given, assign=True)
    assert layer.workspace.memory.gamma.dtype == torch.float32
    assert isinstance(layer.workspace.memory.gamma, torch.nn.Parameter) == (kind == "learned")
    assert given["workspace.memory.gamma"].dtype == dtype
    layer(torch.randn(3, 5, 16)).sum().backward()


def test_update_is_in_place_and_outside_autograd() -> None:
    layer = make_layer()
    gamma = layer.workspace.memory.gamma
    before, pointer = gamma.clone(), gamma.data_ptr()
    layer(torch.randn(4, 7, 16))
    assert layer.workspace.memory.gamma is gamma and gamma.data_ptr() == pointer
    assert not torch.equal(gamma, before)
    assert not gamma.requires_grad and gamma.grad_fn is None


def test_updated_rows_have_unit_norm() -> None:
    layer = make_layer()
    for _ in range(50):
        layer(torch.randn(4, 7, 16))
    assert_close(torch.linalg.vector_norm(layer.workspace.memory.gamma, dim=-1), torch.ones(5))


@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_two_forwards_before_one_backward_equal_each_alone(semantics: str) -> None:
    """The second pass overwrites the memory that the first one's graph still needs."""
    x = [torch.randn(4, 7, 16, dtype=torch.float64) for _ in range(2)]

    def gradients(together: bool) -> dict[str, torch.Tensor]:
        layer = make_layer(semantics=semantics, dtype=torch.float64)
        with ait.balance_losses(layer) as losses:
            if together:
                outputs = [layer(batch) for batch in x]
                (sum(out.square().sum() for out in outputs) + sum(losses)).backward()
            else:
                for i, batch in enumerate(x):
                    (layer(batch).square().sum() + losses[i]).backward()
        return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}

    together, alone = gradients(True), gradients(False)
    assert together.keys() == alone.keys() != set()
    for name, gradient in together.items():
        assert_close(gradient, alone[name], name)


@pytest.mark.parametrize("memory", ["learned", "fixed"])
def test_memories_without_a_writer_are_never_overwritten_by_a_pass(memory: str) -> None:
    layer = make_layer(memory=memory)
    before = layer.workspace.memory.gamma.detach().clone()
    layer(torch.randn(4, 7, 16)).sum().backward()
    assert torch.equal(layer.workspace.memory.gamma, before)
    assert ait.balance_loss(layer) == 0
    assert (layer.workspace.memory.gamma.grad is not None) == (memory == "learned")


POISONS: dict[str, Any] = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("top_k", [4, 1000])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_a_non_finite_batch_leaves_the_memory_unchanged_and_is_counted(poison: str, top_k: int, semantics: str) -> None:
    layer = make_layer(semantics=semantics, top_k=top_k)
    layer(torch.randn(4, 7, 16))
    before = layer.workspace.memory.gamma.clone()
    x = torch.randn(4, 7, 16)
    x[1, 2] = POISONS[poison]
    output = layer(x)
    assert torch.equal(layer.workspace.memory.gamma, before)
    assert layer.workspace.memory.skipped_updates == 1
    clean = torch.ones(4, 7, dtype=torch.bool)
    clean[1, 2] = False
    ait.freeze_memory(layer)
    assert torch.equal(output[clean], layer(x)[clean]), "such a batch reads the old memory"
    ait.freeze_memory(layer, False)
    layer(torch.randn(4, 7, 16))
    assert not torch.equal(layer.workspace.memory.gamma, before), "and the next one writes again"
    assert layer.workspace.memory.skipped_updates == 1


def test_an_update_whose_norm_overflows_is_refused() -> None:
    layer = make_layer()
    before = layer.workspace.memory.gamma.clone()
    with torch.no_grad():
        layer.workspace.writer.norm.weight.fill_(1e30)
    layer(torch.randn(4, 7, 16))
    assert torch.equal(layer.workspace.memory.gamma, before)
    assert layer.workspace.memory.skipped_updates == 1


def test_a_loss_that_is_nan_poisons_no_later_step() -> None:
    layer, untouched = (make_layer() for _ in range(2))
    layer(torch.full((4, 7, 16), torch.nan))
    x = torch.randn(4, 7, 16)
    assert torch.equal(layer(x), untouched(x))


def test_reset_is_reproducible_and_different_for_each_layer() -> None:
    model = torch.nn.Sequential(make_layer(), make_layer(memory="fixed"))
    ait.reset_memory(model, seed=4)
    first = [layer.workspace.memory.gamma.clone() for layer in model]
    model(torch.randn(4, 7, 16))
    model(torch.full((4, 7, 16), torch.nan))
    ait.reset_memory(model, seed=4)
    assert all(torch.equal(layer.workspace.memory.gamma, rows) for layer, rows in zip(model, first, strict=True))
    assert not torch.equal(first[0], first[1])
    assert model[0].workspace.memory.skipped_updates == 0
    ait.reset_memory(model, seed=generator(4))
    assert all(torch.equal(layer.workspace.memory.gamma, rows) for layer, rows in zip(model, first, strict=True))
    torch.manual_seed(4)
    ait.reset_memory(model)
    assert torch.equal(model[0].workspace.memory.gamma, first[0]), "None: the global generator"


def test_reset_before_the_backward_pass_does_not_disturb_it() -> None:
    layer = make_layer()
    expected = copy.deepcopy(layer)
    x = torch.randn(4, 7, 16)
    output, expected_output = layer(x), expected(x)
    ait.reset_memory(layer, seed=1)
    output.square().sum().backward()
    expected_output.square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
