"""Hopfield retrieval: every token is rebuilt from the patterns in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ait.ops import reference
from ait.ops._checks import (
    check_positive_int,
    check_tensors,
    check_tokens,
    is_positive_in,
    no_double_backward,
    op_error,
)
from ait.ops._first_use import check_first_use
from ait.ops._library import register_reference

MAX_STEPS = 10_000


def hopfield_retrieve(
    state: Tensor, patterns: Tensor, beta: float = 1.0, steps: int = 1, tol: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Continuous Hopfield retrieval: ``xi <- softmax(beta xi P^T) P``, ``steps`` times, for each token alone.

    Steps after the first stay in ``M`` dimensions, with the Gram matrix ``P P^T``. Differentiable, once, in
    ``state`` and ``patterns``, through the steps that were taken. The result of a token does not depend on
    the other tokens, bit for bit.

    Args:
        state: ``(T, E)``; float32, float64, bfloat16 or float16.
        patterns: ``(M, E)``, ``M >= 1``; float32, or the dtype of ``state``.
        beta: inverse temperature, finite and positive in float32 (float64 for a float64 state).
        steps: the most update steps, from 1 to 10,000.
        tol: a token stops after the first step that changes it by less than ``tol`` in L2 norm (in the units
            of ``state``); 0 never stops.

    Returns:
        ``out (T, E)`` in the dtype of ``state``; ``steps_taken (T,)`` int64; ``lse (T,)``, the
        ``logsumexp(beta state P^T)`` of the input state, float32 (float64 for a float64 state). The last two
        are not differentiable; :func:`hopfield_energy` is.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes, devices or numbers are not as above.

    Source: Ramsauer et al., Hopfield Networks is All You Need, arXiv 2008.02217, eq. 3.
    """
    name = "hopfield_retrieve"
    check_tensors(name, state=state, patterns=patterns)
    if state.dim() != 2:
        raise op_error(name, "state of shape (T, E)", tuple(state.shape))
    _check_patterns(name, state, patterns, beta)
    steps = check_positive_int(name, "steps", steps)
    if steps > MAX_STEPS:
        raise op_error(name, f"steps of at most {MAX_STEPS}", steps)
    if not 0 <= tol < math.inf:
        raise op_error(name, "a finite tol >= 0", tol)
    check_first_use(state)
    return torch.ops.ait.hopfield_retrieve(state, patterns, beta, steps, tol)


def hopfield_energy(state: Tensor, patterns: Tensor, beta: float = 1.0) -> Tensor:
    """Energy of the continuous Hopfield network, which :func:`hopfield_retrieve` never raises.

    ``E(xi) = -logsumexp(beta xi P^T)/beta + xi.xi/2 + log(M)/beta + max_i |P_i|^2 / 2``, at least 0. Plain
    PyTorch, differentiable any number of times.

    Args:
        state: ``(..., E)``.
        patterns: ``(M, E)``, ``M >= 1``.
        beta: inverse temperature, finite and positive in float32 (float64 for a float64 state).

    Returns:
        ``(...)``, float32 (float64 for a float64 state).

    Raises:
        ValueError: shapes, dtypes, devices or ``beta`` are not as above.

    Source: Ramsauer et al., Hopfield Networks is All You Need, arXiv 2008.02217, eq. 2.
    """
    _check_patterns("hopfield_energy", state, patterns, beta)
    dtype = reference.accumulate_dtype(state.dtype)
    xi, p_ME = state.to(dtype), patterns.to(dtype)
    lse = torch.logsumexp(beta * (xi @ p_ME.T), dim=-1)
    largest = p_ME.square().sum(-1).max()
    return -lse / beta + xi.square().sum(-1) / 2 + math.log(patterns.shape[0]) / beta + largest / 2


def _check_patterns(name: str, state: Tensor, patterns: Tensor, beta: float) -> None:
    if state.dim() < 1 or patterns.dim() != 2 or patterns.shape[1] != state.shape[-1] or patterns.shape[0] < 1:
        expected = f"patterns of shape (M, {state.shape[-1] if state.dim() else 'E'}), M >= 1 and E as in state"
        raise op_error(name, expected, tuple(patterns.shape))
    check_tokens(name, patterns=patterns, state=state)
    dtype = reference.accumulate_dtype(state.dtype)
    if not is_positive_in(dtype, beta):
        raise op_error(name, f"a finite beta > 0 in {dtype}", beta)


register_reference("hopfield_retrieve", reference.hopfield_retrieve)
register_reference("hopfield_retrieve_backward", reference.hopfield_retrieve_backward)


@torch.library.register_fake("ait::hopfield_retrieve")
def _(state, patterns, beta, steps, tol):
    num_tokens = state.shape[0]
    lse = state.new_empty(num_tokens, dtype=reference.accumulate_dtype(state.dtype))
    return state.new_empty(state.shape), state.new_empty(num_tokens, dtype=torch.int64), lse


@torch.library.register_fake("ait::hopfield_retrieve_backward")
def _(grad_out, state, patterns, steps_taken, beta, steps):
    return state.new_empty(state.shape), patterns.new_empty(patterns.shape)


def _setup_context(ctx, inputs, output):
    state, patterns, ctx.beta, ctx.steps, _ = inputs
    _, steps_taken, lse = output
    ctx.mark_non_differentiable(steps_taken, lse)
    ctx.save_for_backward(state, patterns, steps_taken)


def _backward(ctx, grad_out, grad_steps_taken, grad_lse):
    state, patterns, steps_taken = ctx.saved_tensors
    grad_state, grad_patterns = torch.ops.ait.hopfield_retrieve_backward(
        grad_out, state, patterns, steps_taken, ctx.beta, ctx.steps
    )
    return grad_state, grad_patterns, None, None, None


torch.library.register_autograd("ait::hopfield_retrieve", _backward, setup_context=_setup_context)
torch.library.register_autograd("ait::hopfield_retrieve_backward", no_double_backward("hopfield_retrieve"))
