"""Both readers against direct evaluations; the energy that retrieval never raises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ait.nn.readers import AttentionReader, HopfieldReader
from ait.ops import hopfield_energy
from tests.nn.test_workspace import make_layer
from tests.tolerances import assert_close

# What rounding may add to the energy, relative to its size.
ENERGY_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 1.0, 8.0])
def test_energy_never_rises_over_the_layers_steps(dtype: torch.dtype, beta: float) -> None:
    layer = make_layer(dtype=dtype).eval()
    memory = layer.workspace.memory.gamma
    tokens = 3 * torch.randn(50, 16, dtype=dtype)
    patterns = layer.workspace.reader.patterns(memory).detach()
    energies = [hopfield_energy(tokens, patterns, beta)]
    for steps in (1, 2, 3, 5, 10):
        reader = HopfieldReader(16, 8, beta=beta, steps=steps, dtype=dtype)
        reader.load_state_dict(layer.workspace.reader.state_dict())
        energies.append(hopfield_energy(reader(tokens, memory).detach(), patterns, beta))
    for earlier, later in itertools.pairwise(energies):
        assert (later <= earlier + ENERGY_ROUNDING[dtype] * earlier.abs().clamp_min(1)).all()
    assert (energies[1] < energies[0]).all()


def test_the_energys_gradient_step_is_the_update() -> None:
    """xi - dE/dxi = softmax(beta xi P^T) P: the update is the energy's own."""
    reader = HopfieldReader(16, 8, beta=0.7, dtype=torch.float64)
    memory = torch.randn(5, 8, dtype=torch.float64)
    tokens = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    patterns = reader.patterns(memory).detach()
    (slope,) = torch.autograd.grad(hopfield_energy(tokens, patterns, 0.7).sum(), tokens)
    assert_close(reader(tokens, memory).detach(), (tokens - slope).detach())


def test_tolerance_stops_each_token_alone() -> None:
    stopped, running = (make_layer(steps=50, tol=tol, dtype=torch.float64).eval() for tol in (1e3, 0.0))
    once = make_layer(steps=1, dtype=torch.float64).eval()
    x = torch.randn(4, 7, 16, dtype=torch.float64)
    assert torch.equal(stopped(x), once(x)), "every first step moves by less"
    assert not torch.allclose(running(x), once(x))


def test_attention_reader_equals_one_head_at_a_time_with_every_gradient() -> None:
    reader = AttentionReader(16, 8, num_heads=3, dtype=torch.float64)
    memory = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    heads = []
    for head in range(3):
        rows = slice(head * 8, (head + 1) * 8)
        query = tokens @ reader.query.weight[rows].T
        key, value = memory @ reader.key.weight[rows].T, memory @ reader.value.weight[rows].T
        heads.append(torch.softmax(query @ key.T / math.sqrt(8), dim=-1) @ value)
    expected = torch.cat(heads, dim=-1) @ reader.out.weight.T + reader.out.bias
    output = reader(tokens, memory)
    assert_close(output, expected)
    leaves = {"tokens": tokens, "memory": memory, **dict(reader.named_parameters())}
    weights = torch.randn_like(output)
    for name, actual, gradient in zip(
        leaves,
        torch.autograd.grad(output, list(leaves.values()), weights),
        torch.autograd.grad(expected, list(leaves.values()), weights),
        strict=True,
    ):
        assert_close(actual, gradient, name)


@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_readers_read_the_memory_that_the_batch_has_just_written(semantics: str) -> None:
    for reader in ("hopfield", "attention"):
        layer = make_layer(reader=reader, semantics=semantics, dtype=torch.float64)
        f = torch.randn(4, 7, 16, dtype=torch.float64)
        retrieved = layer.workspace(f)
        assert_close(retrieved.flatten(0, 1), layer.workspace.reader(f.flatten(0, 1), layer.workspace.memory.gamma))


@pytest.mark.parametrize("reader", ["hopfield", "attention"])
def test_write_learns_through_the_reader(reader: str) -> None:
    layer = make_layer(reader=reader, balance_weight=0.0)
    layer(torch.randn(4, 7, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.workspace.writer.parameters())
