"""The reference operators against their equations, written out token by token in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ait.ops import reference
from tests.ops.common import generator

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: Vector) -> Vector:
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def mix(weights: Vector, vectors: list[Vector]) -> Vector:
    return [math.fsum(w * v[i] for w, v in zip(weights, vectors, strict=True)) for i in range(len(vectors[0]))]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def assert_equal(actual: Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 11, 50])
@pytest.mark.parametrize("masked", [False, True])
def test_select_keeps_the_first_k_of_a_stable_descending_sort(k: int, masked: bool) -> None:
    query, tokens = randn(2, 3, 4), randn(11, 2, 4, seed=1)
    tokens[5] = tokens[2]  # ties: the lower index wins
    tokens[9] = tokens[2]
    mask = torch.zeros(11, dtype=torch.bool)
    if masked:
        mask[[0, 2, 7]] = True
    values, indices = reference.bottleneck_select(query, tokens, k, mask if masked else None)
    width = min(k, 11)
    assert values.shape == indices.shape == (2, 3, width)
    for g in range(2):
        for r in range(3):
            logits = [dot(query[g, r].tolist(), tokens[t, g].tolist()) for t in range(11)]
            candidates = [t for t in range(11) if not mask[t]]
            kept = sorted(sorted(candidates, key=lambda t: -logits[t])[:width])
            padding = width - len(kept)
            assert indices[g, r].tolist() == kept + [-1] * padding
            assert_equal(values[g, r], [logits[t] for t in kept] + [-math.inf] * padding)


def test_select_counts_nan_as_largest_and_zeros_as_equal() -> None:
    logits = torch.tensor([0.0, math.nan, -0.0, math.inf, -math.nan, -math.inf, 1.0])
    for k, expected in ((1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (5, [0, 1, 3, 4, 6]), (6, [0, 1, 2, 3, 4, 6])):
        _, indices = reference.bottleneck_select(torch.ones(1, 1, 1), logits[:, None], k)
        assert indices[0, 0].tolist() == expected


def test_select_rounds_both_operands_to_the_selection_dtype() -> None:
    query, tokens = torch.tensor([[[1.0 + 2**-12]]]), torch.tensor([[1.0], [1.0 + 2**-12]])
    values, indices = reference.bottleneck_select(query, tokens, 1, selection_dtype=torch.bfloat16)
    assert indices.item() == 0 and values.item() == 1.0
    _, indices = reference.bottleneck_select(query, tokens, 1)
    assert indices.item() == 1


def test_attend_is_softmax_attention_over_the_listed_tokens() -> None:
    query, tokens = randn(4, 3), randn(8, 3, seed=1)
    indices = torch.tensor([[0, 3, 7], [2, 5, -1], [4, -1, -1], [-1, -1, -1]])
    pooled, gates, lse = reference.bottleneck_attend(query, tokens, indices)
    for r in range(4):
        listed = [t for t in indices[r].tolist() if t >= 0]
        logits = [dot(query[r].tolist(), tokens[t].tolist()) for t in listed]
        weights = softmax(logits) if listed else []
        assert_equal(gates[r], weights + [0.0] * (3 - len(listed)))
        assert_equal(pooled[r], mix(weights, [tokens[t].tolist() for t in listed]) if listed else [0.0] * 3)
        expected = math.log(math.fsum(map(math.exp, logits))) if listed else -math.inf
        assert_equal(lse[r], expected)


@pytest.mark.parametrize("absent", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_attend_backward_is_the_gradient_of_the_forward(absent: tuple[int, ...]) -> None:
    query, tokens = randn(4, 3).requires_grad_(), randn(8, 3, seed=1).requires_grad_()
    indices = torch.tensor([[0, 3, 7], [2, 3, -1], [3, -1, -1], [-1, -1, -1]])
    outputs = reference.bottleneck_attend(query, tokens, indices)
    incoming: list[Tensor | None] = [torch.randn_like(x) for x in outputs]
    for i in absent:
        incoming[i] = None
    actual = reference.bottleneck_attend_backward(
        *incoming, query.detach(), tokens.detach(), indices, outputs[0].detach(), outputs[1].detach()
    )
    finite = outputs[0][:3], outputs[1][:3], outputs[2][:3]  # the empty row has lse -inf and no gradient
    loss = sum((x * g[:3]).sum() for x, g in zip(finite, incoming, strict=True) if g is not None)
    expected = torch.autograd.grad(loss, (query, tokens)) if len(absent) < 3 else (query * 0, tokens * 0)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-12, atol=1e-12)


def test_attend_over_all_tokens_is_dense_attention() -> None:
    query, tokens = randn(5, 6), randn(9, 6, seed=1)
    pooled, gates, _ = reference.bottleneck_attend(query, tokens, torch.arange(9).expand(5, 9))
    torch.testing.assert_close(gates, torch.softmax(query @ tokens.T, -1))
    torch.testing.assert_close(pooled, torch.softmax(query @ tokens.T, -1) @ tokens)


@pytest.mark.parametrize(("steps", "tol"), [(1, 0.0), (4, 0.0), (8, 0.2)])
def test_retrieve_iterates_softmax_attention_over_the_patterns(steps: int, tol: float) -> None:
    state, patterns, beta = randn(12, 5), randn(4, 5, seed=1), 0.8
    out, steps_taken, lse = reference.hopfield_retrieve(state, patterns, beta, steps, tol)
    p = patterns.tolist()
    for t in range(12):
        xi, taken = state[t].tolist(), 0
        assert_equal(lse[t], math.log(math.fsum(math.exp(beta * dot(xi, row)) for row in p)))
        for _ in range(steps):
            updated = mix(softmax([beta * dot(xi, row) for row in p]), p)
            change = math.dist(updated, xi)
            xi, taken = updated, taken + 1
            if change < tol:
                break
        assert_equal(out[t], xi)
        assert int(steps_taken[t]) == taken
    assert tol == 0 or steps_taken.unique().numel() > 1


@pytest.mark.parametrize(("steps", "tol"), [(1, 0.0), (4, 0.0), (8, 0.2)])
def test_retrieve_backward_is_the_gradient_through_the_steps_taken(steps: int, tol: float) -> None:
    state, patterns = randn(12, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    out, steps_taken, _ = reference.hopfield_retrieve(state, patterns, 0.8, steps, tol)
    grad_out = randn(12, 5, seed=2)
    expected = torch.autograd.grad(out, (state, patterns), grad_out)
    actual = reference.hopfield_retrieve_backward(grad_out, state.detach(), patterns.detach(), steps_taken, 0.8, steps)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tokens_are_summed_in_float32(dtype: torch.dtype) -> None:
    query, tokens = randn(3, 600).float(), randn(40, 600, seed=1).to(dtype)
    indices = torch.arange(40).expand(3, 40)
    for function, rest in (
        (reference.bottleneck_attend, (indices,)),
        (lambda q, x: reference.hopfield_retrieve(x, q, 0.01, 1, 0.0), ()),
    ):
        narrow = function(query, tokens, *rest)
        wide = function(query, tokens.float(), *rest)
        for a, b in zip(narrow, wide, strict=True):
            assert torch.equal(a, b.to(a.dtype))
