"""Bottleneck selection: which tokens each memory row lets in."""

from __future__ import annotations

import torch
from torch import Tensor

from ait.ops import reference
from ait.ops._checks import check_mask, check_positive_int, check_tensors, check_tokens, op_error
from ait.ops._first_use import check_first_use
from ait.ops._library import register_reference


def bottleneck_select(
    query: Tensor,
    tokens: Tensor,
    k: int,
    mask: Tensor | None = None,
    selection_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds, for each query row, the ``k`` tokens with the largest logits ``query . token``.

    Exact and deterministic: the set is the first ``k`` of a stable descending sort of the logits. Of equal
    logits the lower token index wins; all NaNs count as one value larger than everything; ``-0 == +0``.
    Not differentiable. The full ``(G, R, T)`` logits are never held.

    Logits that are there already, ``(T, R)`` and contiguous, are selected from with ``query = ones(R, 1, 1)`` and
    ``tokens = logits.unsqueeze(-1)``; on CPU they are filtered side by side.

    Args:
        query: ``(G, R, d)``; float32, or the dtype of ``tokens``.
        tokens: ``(T, G, d)``, or ``(T, d)`` for ``G = 1``; float32, float64, bfloat16 or float16.
        k: capacity of a row, at least 1; more than ``T`` means all tokens.
        mask: ``(T,)`` bool, True = ignore: such tokens are never chosen.
        selection_dtype: dtype to which both operands are rounded before the product (``torch.bfloat16`` or
            ``torch.float16``, for speed). By default nothing is rounded. Sums are float32 (float64 for
            float64 tokens) either way. On CPUs with AMX or AVX512-BF16, bfloat16 operands are multiplied as they
            are: float32 sums in another order, where subnormal numbers count as zero, so that other processors may
            give other logits in the last bits, and another choice between two that are as close. With AMX, large
            selections in float32 (``R`` and ``d`` from 64, ``T`` from 2,048 and ``48 k``) compute only those logits
            that products of bfloat16 cannot rule out: exact, with an order of sums of their own, so that the last
            bits of a logit may differ between shapes. ``AIT_BFLOAT16_PRODUCTS=none`` in the environment does without
            both.

    Returns:
        ``values (G, R, min(k, T))``, the logits, float32 or float64, and ``indices`` of the same shape, int64,
        ascending and unique. A row with fewer than ``k`` candidates ends in index -1 and value ``-inf``.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes, devices or ``k`` are not as above.

    Source: Associative Transformer, arXiv 2309.12862, bottleneck attention.
    """
    name = "bottleneck_select"
    check_tensors(name, query=query, tokens=tokens)
    if query.dim() != 3:
        raise op_error(name, "query of shape (G, R, d)", tuple(query.shape))
    groups, _, width = query.shape
    shape = tuple(tokens.shape)
    if not (tokens.dim() == 3 and shape[1:] == (groups, width)) and not (
        tokens.dim() == 2 and groups == 1 and shape[1] == width
    ):
        raise op_error(name, f"tokens of shape (T, {groups}, {width}), G and d as in query", shape)
    check_tokens(name, query=query, tokens=tokens)
    k = check_positive_int(name, "k", k)
    if mask is not None:
        check_mask(name, mask, tokens)
    if selection_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise op_error(name, "selection_dtype None, float32, bfloat16 or float16", selection_dtype)
    check_first_use(tokens)
    return torch.ops.ait.bottleneck_select(query, tokens, k, mask, selection_dtype)


register_reference("bottleneck_select", reference.bottleneck_select)


@torch.library.register_fake("ait::bottleneck_select")
def _(query, tokens, k, mask=None, selection_dtype=None):
    shape = (query.shape[0], query.shape[1], torch.sym_min(k, tokens.shape[0]))
    dtype = reference.accumulate_dtype(tokens.dtype)
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _backward(ctx, grad_values, grad_indices):
    return None, None, None, None, None


torch.library.register_autograd("ait::bottleneck_select", _backward, setup_context=_setup_context)
