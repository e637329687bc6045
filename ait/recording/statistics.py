"""Numbers that say how evenly slots, heads and tokens are used."""

from __future__ import annotations

import torch
from torch import Tensor


def perplexity(weights: Tensor) -> Tensor:
    """``exp(entropy)`` over the last axis: how many entries carry the weight, from 1 (one does) to all (evenly).

    Args:
        weights: ``(..., n)``, at least 0; they are divided by their sum first.

    Returns:
        ``(...)``; 0 where all weights are 0.
    """
    total = weights.sum(-1, keepdim=True)
    shares = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
    entropy = torch.special.entr(shares).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), torch.zeros_like(entropy))


def dense_gates(gates: Tensor, indices: Tensor | None, num_tokens: int) -> Tensor:
    """Gates by token, zero for tokens that a row does not take.

    Args:
        gates: ``(..., k)``, 0 where the index is -1.
        indices: ``(..., k)``, or None where ``k`` is all tokens, in order.
        num_tokens: ``T``.

    Returns:
        ``(..., T)``.
    """
    if indices is None:
        return gates
    nothing = gates.new_zeros(*gates.shape[:-1], num_tokens)
    return nothing.scatter_add(-1, indices.clamp(min=0), gates)


def retrieval_weights(state: Tensor, patterns: Tensor, beta: float, steps: Tensor) -> Tensor:
    """Weights of the last retrieval step, so that the retrieved token is ``weights @ patterns``.

    Args:
        state: ``(T, E)``, before the first step.
        patterns: ``(M, E)``.
        beta: inverse temperature.
        steps: ``(T,)`` int64, the steps that each token takes, at least 1.

    Returns:
        ``(T, M)``, rows sum to 1.
    """
    weights = torch.softmax(beta * (state @ patterns.T), dim=-1)
    gram = patterns @ patterns.T
    for step in range(1, int(steps.max()) if steps.numel() else 1):
        following = torch.softmax(beta * (weights @ gram), dim=-1)
        weights = torch.where((steps > step).unsqueeze(-1), following, weights)
    return weights


def energy_path(state: Tensor, patterns: Tensor, beta: float, steps: int) -> Tensor:
    """Energy of each token before the first retrieval step and after each of ``steps`` steps.

    Args:
        state: ``(T, E)``.
        patterns: ``(M, E)``.
        beta: inverse temperature.
        steps: number of steps, which may be more than the layer takes.

    Returns:
        ``(steps + 1, T)``; see :func:`ait.ops.hopfield_energy`.
    """
    from ait.ops import hopfield_energy

    energies = [hopfield_energy(state, patterns, beta)]
    for _ in range(steps):
        state = torch.softmax(beta * (state @ patterns.T), dim=-1) @ patterns
        energies.append(hopfield_energy(state, patterns, beta))
    return torch.stack(energies)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """What :func:`torch.nn.functional.scaled_dot_product_attention` weighs the values with, as a mean over heads.

    Args:
        query: ``(..., H, N, d)``.
        key: ``(..., H', N', d)``, where ``H'`` divides ``H``.
        mask: bool (True = takes part) or a term added to the logits.
        is_causal: whether a token sees only itself and those before it.
        scale: factor of the logits, ``1 / sqrt(d)`` by default.

    Returns:
        ``(..., N, N')``, float32 (float64 for float64 queries); 0 where a query may see no key.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(dtype), key.to(dtype)
    if key.dim() > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(dtype)
    weights = torch.softmax(logits, dim=-1)
    if mask is not None:
        weights = weights.masked_fill(torch.isneginf(logits).all(-1, keepdim=True), 0)
    return weights.mean(-3)
