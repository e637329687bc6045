"""The operators in plain PyTorch, as the equations read: the oracle of the tests, and the fallback
on devices without compiled kernels.

Shapes: ``G`` groups (heads), ``R`` rows a group, ``T`` tokens, ``E`` (or ``d``) width, ``k`` capacity,
``M`` patterns. Sums run in float32, or in float64 where the tokens are float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the operators compute for tokens of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bottleneck_select(
    query: Tensor,
    tokens: Tensor,
    k: int,
    mask: Tensor | None = None,
    selection_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`ait.ops.bottleneck_select`; holds all ``(G, R, T)`` logits at once."""
    if tokens.dim() == 2:
        tokens = tokens.unsqueeze(1)
    num_tokens, dtype = tokens.shape[0], accumulate_dtype(tokens.dtype)
    width = min(k, num_tokens)
    if selection_dtype is not None:
        query, tokens = query.to(selection_dtype), tokens.to(selection_dtype)
    logits = torch.einsum("grd,tgd->grt", query.to(dtype), tokens.to(dtype))
    ignored = torch.zeros(num_tokens, dtype=torch.bool, device=tokens.device) if mask is None else mask
    candidates = torch.nonzero(~ignored).squeeze(1)
    # A stable descending sort keeps the lower index first among equals and puts NaN before everything.
    order = torch.sort(logits[..., candidates], dim=-1, descending=True, stable=True).indices
    kept = candidates[order[..., :width]].sort(dim=-1).values
    padding = width - kept.shape[-1]
    values = torch.nn.functional.pad(logits.gather(-1, kept), (0, padding), value=-math.inf)
    return values, torch.nn.functional.pad(kept, (0, padding), value=-1)


def _gather(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The listed tokens ``(R, k, E)``, zero where the index is -1, and which entries are real ``(R, k)``."""
    _check_lists(indices, tokens.shape[0])
    real = indices >= 0
    gathered = tokens[indices.clamp(min=0)] if tokens.shape[0] else tokens.new_zeros(*indices.shape, tokens.shape[1])
    return gathered.masked_fill(~real.unsqueeze(-1), 0), real


def _check_lists(indices: Tensor, num_tokens: int) -> None:
    """Refuses what the compiled kernels refuse; an index out of range would end a CUDA process."""
    in_range = (indices >= -1) & (indices < num_tokens)
    before, after = indices[:, :-1], indices[:, 1:]
    in_order = (after == -1) | ((before >= 0) & (after > before))
    bad_rows = torch.nonzero(~(in_range.all(-1) & in_order.all(-1)))
    if bad_rows.numel():
        expected = f"indices ascending and unique in [0, {num_tokens}), -1 last"
        raise RuntimeError(f"bottleneck_attend: expected {expected}, got something else in row {bad_rows[0].item()}")


def bottleneck_attend(query: Tensor, tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ait.ops.bottleneck_attend`."""
    dtype = accumulate_dtype(tokens.dtype)
    x_RkE, real_Rk = _gather(tokens.to(dtype), indices)
    logits_Rk = torch.einsum("re,rke->rk", query.to(dtype), x_RkE).masked_fill(~real_Rk, -math.inf)
    lse_R = torch.logsumexp(logits_Rk, dim=-1)
    empty_R = (lse_R == -math.inf).unsqueeze(-1)
    gates_Rk = torch.softmax(logits_Rk, dim=-1).masked_fill(empty_R | ~real_Rk, 0)
    pooled_RE = torch.einsum("rk,rke->re", gates_Rk, x_RkE).masked_fill(empty_R, 0)
    return pooled_RE, gates_Rk, lse_R


def bottleneck_attend_backward(
    grad_pooled: Tensor | None,
    grad_gates: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    tokens: Tensor,
    indices: Tensor,
    pooled: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`bottleneck_attend` in ``query`` and ``tokens``; an absent gradient counts as zero."""
    dtype = accumulate_dtype(tokens.dtype)
    grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled.to(dtype)
    grad_gates = torch.zeros_like(gates) if grad_gates is None else grad_gates.to(dtype)
    grad_lse = gates.new_zeros(gates.shape[0]) if grad_lse is None else grad_lse.to(dtype)
    x_RkE, real_Rk = _gather(tokens.to(dtype), indices)
    u_Rk = torch.einsum("re,rke->rk", grad_pooled, x_RkE) + grad_gates.masked_fill(~real_Rk, 0)
    mean_u_R1 = (gates * u_Rk).sum(-1, keepdim=True)
    # A row that took part nowhere has gates 0 throughout, so its gradients vanish (0 * inf must not make NaN).
    takes_part = real_Rk & (gates.sum(-1, keepdim=True) != 0)
    dl_Rk = (gates * (u_Rk - mean_u_R1 + grad_lse.unsqueeze(-1))).masked_fill(~takes_part, 0)
    grad_query = torch.einsum("rk,rke->re", dl_Rk, x_RkE.masked_fill(~takes_part.unsqueeze(-1), 0))
    per_entry_RkE = gates.unsqueeze(-1) * grad_pooled.unsqueeze(1) + dl_Rk.unsqueeze(-1) * query.to(dtype).unsqueeze(1)
    per_entry_RkE = per_entry_RkE.masked_fill(~takes_part.unsqueeze(-1), 0)
    grad_tokens = torch.zeros_like(tokens, dtype=dtype)
    if tokens.shape[0]:
        grad_tokens.index_add_(0, indices.clamp(min=0).flatten(), per_entry_RkE.flatten(0, 1))
    return grad_query.to(query.dtype), grad_tokens.to(tokens.dtype)


def hopfield_retrieve(
    state: Tensor, patterns: Tensor, beta: float, steps: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ait.ops.hopfield_retrieve`; every step is taken in the ``E``-wide space of the equations."""
    dtype = accumulate_dtype(state.dtype)
    xi_TE, p_ME = state.to(dtype), patterns.to(dtype)
    lse_T = torch.logsumexp(beta * (xi_TE @ p_ME.T), dim=-1)
    steps_taken_T = torch.zeros(state.shape[0], dtype=torch.int64, device=state.device)
    active_T = torch.ones(state.shape[0], dtype=torch.bool, device=state.device)
    for _ in range(steps):
        updated_TE = torch.softmax(beta * (xi_TE @ p_ME.T), dim=-1) @ p_ME
        change_T = torch.linalg.vector_norm(updated_TE - xi_TE, dim=-1)
        xi_TE = torch.where(active_T.unsqueeze(-1), updated_TE, xi_TE)
        steps_taken_T += active_T
        if tol > 0:
            active_T = active_T & ~(change_T < tol)
    return xi_TE.to(state.dtype), steps_taken_T, lse_T


def hopfield_retrieve_backward(
    grad_out: Tensor, state: Tensor, patterns: Tensor, steps_taken: Tensor, beta: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`hopfield_retrieve` in ``state`` and ``patterns``, through the steps that were taken."""
    dtype = accumulate_dtype(state.dtype)
    p_ME = patterns.to(dtype)
    states, weights = [state.to(dtype)], []
    for _ in range(steps):
        weights.append(torch.softmax(beta * (states[-1] @ p_ME.T), dim=-1))
        states.append(weights[-1] @ p_ME)
    grad_xi_TE, grad_p_ME = grad_out.to(dtype), torch.zeros_like(p_ME)
    for step in reversed(range(steps)):
        taken_T1 = (steps_taken > step).unsqueeze(-1)
        w_TM, g_TE = weights[step], grad_xi_TE.masked_fill(~taken_T1, 0)
        dw_TM = g_TE @ p_ME.T
        da_TM = w_TM * (dw_TM - (w_TM * dw_TM).sum(-1, keepdim=True))
        grad_p_ME += w_TM.T @ g_TE + beta * (da_TM.T @ states[step])
        grad_xi_TE = torch.where(taken_T1, beta * (da_TM @ p_ME), grad_xi_TE)
    return grad_xi_TE.to(state.dtype), grad_p_ME.to(patterns.dtype)


def importance_and_load(gates: Tensor, indices: Tensor | None, num_tokens: int, num_heads: int) -> Tensor:
    """Per head and token, the sum of its gates and the number of its gates above 0.

    The sums are exact, hence the same bits in every order (threads, atomics, compilers): float64 holds any sum of
    ``M`` gates once each is rounded to a multiple of ``2^-q``, with ``q = 47`` for 32 slots.

    Args:
        gates: ``(S*M, k)``, heads outermost, each in ``[0, 1]``; 0 where the index is -1.
        indices: ``(S*M, k)``, the tokens that the gates belong to; None where ``k`` is all tokens, in order.
        num_tokens: ``T``.
        num_heads: ``S``.

    Returns:
        ``(2, S, T)``: importance, differentiable in ``gates``, and load, which is not. float64 (float32 on MPS,
        which has nothing wider).
    """
    slots_per_head = gates.shape[0] // num_heads
    wide = gates.to(torch.float32 if gates.device.type == "mps" else torch.float64)
    is_open = (gates > 0).to(wide.dtype)
    if wide.dtype == torch.float64:
        # What lies between this number and twice as much are the multiples of 2^-q.
        power = 2.0 ** (slots_per_head - 1).bit_length()
        wide = (wide + power) - power
    if indices is None:
        shape = (num_heads, slots_per_head, num_tokens)
        return torch.stack([wide.reshape(shape).sum(1), is_open.reshape(shape).sum(1)])
    sums, where = wide.new_zeros(2, num_heads, num_tokens), indices.clamp(min=0).reshape(num_heads, -1)
    sums[0].scatter_add_(1, where, wide.reshape(num_heads, -1))
    sums[1].scatter_add_(1, where, is_open.reshape(num_heads, -1))
    return sums


def squared_variation(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``CV^2(v) = var_unbiased(v) / (mean(v)^2 + 1e-10)`` over the last axis; 0 for fewer than two entries.

    Args:
        values: ``(..., T)``; 0 where masked.
        mask: ``(T,)`` bool, True = ignore, or None.

    Returns:
        Three tensors ``(..., 1)``: ``CV^2``, and ``scale`` and ``center`` of its derivative by an entry,
        ``2 (v - center) / scale``.
    """
    count: float | Tensor
    freedom: float | Tensor
    if mask is None:
        count, freedom = float(max(values.shape[-1], 1)), float(max(values.shape[-1] - 1, 1))
    else:
        count_seen = (~mask).sum().to(values.dtype)
        count, freedom = count_seen.clamp_min(1), (count_seen - 1).clamp_min(1)
    mean = values.sum(-1, keepdim=True) / count
    deviation = values - mean
    if mask is not None:
        deviation = deviation.masked_fill(mask, 0)
    scale = (mean * mean + 1e-10) * freedom
    variation = (deviation * deviation).sum(-1, keepdim=True) / scale
    return variation, scale, mean + mean * variation * (freedom / count)


def balance_loss(
    gates: Tensor, indices: Tensor, mask: Tensor | None, num_tokens: int, num_heads: int, weight: float
) -> tuple[Tensor, Tensor]:
    """The loss of :func:`ait.ops.balance_loss.balance_of`, and ``slope (S, T)``, its derivative by a token's gates."""
    sums = importance_and_load(gates, indices, num_tokens, num_heads)
    variation, scale, center = squared_variation(sums, mask)
    slope = (sums[0] - center[0]) * (2 * weight / scale[0])
    return (variation.sum() * weight).to(gates.dtype), slope.to(gates.dtype)


def balance_loss_backward(grad_loss: Tensor, gates: Tensor, indices: Tensor, slope: Tensor) -> Tensor:
    """Gradient of :func:`balance_loss` in ``gates``."""
    of_each = slope.gather(1, indices.clamp(min=0).reshape(slope.shape[0], -1)).reshape(indices.shape)
    return grad_loss * of_each.masked_fill(indices < 0, 0)


def memory_snapshot(memory: Tensor) -> Tensor:
    """See :func:`ait.ops.memory_snapshot`."""
    return memory.clone()
