"""Bottleneck attention: each memory row attends to the tokens that it let in."""

from __future__ import annotations

import torch
from torch import Tensor

from ait.ops import reference
from ait.ops._checks import check_tensors, check_tokens, no_double_backward, op_error
from ait.ops._first_use import check_first_use
from ait.ops._library import register_reference


def bottleneck_attend(query: Tensor, tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query row over its own listed tokens.

    ``l_j = query_r . tokens[indices_rj]``, ``gates = softmax(l)``, ``pooled = sum_j gates_j tokens_j`` and
    ``lse = logsumexp(l)``. Entries with index -1 take no part and have gate 0; a row without any, or whose
    logits are all ``-inf``, gives pooled 0, lse ``-inf`` and gradients 0. Differentiable, once, in ``query``
    and ``tokens``; the token gradient is summed in a fixed order, the same bits every time. Where rows list many of
    the tokens, CUDA multiplies with all of them instead (``csrc/cuda/README.md``).

    Args:
        query: ``(R, E)``; float32, or the dtype of ``tokens``.
        tokens: ``(T, E)``; float32, float64, bfloat16 or float16.
        indices: ``(R, k)`` int64, each row ascending and unique in ``[0, T)``, -1 last, as
            :func:`bottleneck_select` gives them.

    Returns:
        ``pooled (R, E)``, ``gates (R, k)`` and ``lse (R,)``, float32 (float64 for float64 tokens).

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices are not as above.
        RuntimeError: an index is out of range or out of order. On CUDA it is a device-side assertion with the same
            message, as for PyTorch's own indexing: reported when the device is next waited for.

    Source: Associative Transformer, arXiv 2309.12862, bottleneck attention.
    """
    name = "bottleneck_attend"
    check_tensors(name, query=query, tokens=tokens, indices=indices)
    if query.dim() != 2:
        raise op_error(name, "query of shape (R, E)", tuple(query.shape))
    if tokens.dim() != 2 or tokens.shape[1] != query.shape[1]:
        raise op_error(name, f"tokens of shape (T, {query.shape[1]}), E as in query", tuple(tokens.shape))
    if indices.dim() != 2 or indices.shape[0] != query.shape[0]:
        raise op_error(name, f"indices of shape ({query.shape[0]}, k), R as in query", tuple(indices.shape))
    if indices.dtype != torch.int64:
        raise op_error(name, "indices of dtype torch.int64", indices.dtype)
    check_tokens(name, query=query, tokens=tokens)
    if indices.device != tokens.device:
        raise op_error(name, f"indices on the device of tokens, {tokens.device}", indices.device)
    check_first_use(tokens)
    return torch.ops.ait.bottleneck_attend(query, tokens, indices)


register_reference("bottleneck_attend", reference.bottleneck_attend)
register_reference("bottleneck_attend_backward", reference.bottleneck_attend_backward)


@torch.library.register_fake("ait::bottleneck_attend")
def _(query, tokens, indices):
    dtype = reference.accumulate_dtype(tokens.dtype)
    pooled = query.new_empty(query.shape, dtype=dtype)
    return pooled, query.new_empty(indices.shape, dtype=dtype), query.new_empty(query.shape[0], dtype=dtype)


@torch.library.register_fake("ait::bottleneck_attend_backward")
def _(grad_pooled, grad_gates, grad_lse, query, tokens, indices, pooled, gates):
    return query.new_empty(query.shape), tokens.new_empty(tokens.shape)


def _setup_context(ctx, inputs, output):
    query, tokens, indices = inputs
    pooled, gates, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, tokens, indices, pooled, gates)


def _backward(ctx, grad_pooled, grad_gates, grad_lse):
    grad_query, grad_tokens = torch.ops.ait.bottleneck_attend_backward(
        grad_pooled, grad_gates, grad_lse, *ctx.saved_tensors
    )
    return grad_query, grad_tokens, None


torch.library.register_autograd("ait::bottleneck_attend", _backward, setup_context=_setup_context)
torch.library.register_autograd("ait::bottleneck_attend_backward", no_double_backward("bottleneck_attend"))
