"""Attention rollout, carried through the workspace: token to slot to token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ait.nn._validate import check_number
from ait.ops._checks import op_error
from ait.recording.trace import AttentionRecord, LayerRecord, Pass, Trace, check_trace

NAME = "attention_rollout"


@dataclass(eq=False)
class Rollout:
    """Where the tokens of some images came from. For each token, its weights, ``others`` and ``memory`` sum to 1."""

    images: list[int]
    """The ``n`` images of the batch that were asked for."""
    weights: Tensor
    """``(n, N, N)``: from each token after the last layer (second axis) to the tokens of its image before the first."""
    others: Tensor
    """``(n, N)``: the share that came from tokens of other images, through the workspace."""
    memory: Tensor
    """``(n, N)``: the share that came from what the memory held before this batch."""


def attention_rollout(
    trace: Trace,
    *,
    index: int = -1,
    images: Sequence[int] | int | None = None,
    attention_weight: float = 0.5,
    workspace_weight: float = 0.5,
    batch_share: float | None = None,
) -> Rollout:
    """Attention rollout through self-attention and workspace.

    In rollout each layer is a matrix of shares, rows summing to 1, and a model is their product, the last layer
    leftmost. Over the ``T`` tokens of the batch:

    - self-attention: ``(1 - a) I + a A``, with the attention weights ``A``, means over heads, within each image;
      ``a = 1/2`` counts the residual connection as much as the attention (Abnar and Zuidema).
    - workspace: ``(1 - w) I + w s R C``. ``R (T, M)`` holds the retrieval weights, from tokens to slots, and
      ``C (M, T)`` the gates of the write, means over heads, from slots to tokens. ``s`` is the share of a slot that is
      due to this batch. What is left, ``w (1 - s)`` and more for slots that took nothing, is due to the memory.

    Like all rollouts this follows shares of attention and not values: it does not see what the MLPs, norms and
    projections do to a token, or that a slot's content is a sum with signs.

    Args:
        trace: recorded with ``attention=True``.
        index: which pass of the trace.
        images: which images of the batch; all by default.
        attention_weight: ``a``, in [0, 1].
        workspace_weight: ``w``, in [0, 1]; 0 leaves the workspaces out (the plain rollout).
        batch_share: ``s``, in [0, 1]. By default what the equation of the memory says: ``alpha`` where the write was
            kept, and 0 where it was not (in eval the memory holds nothing of the batch). 1 follows the slots to what
            they attend to, as though the memory held this batch alone.

    Returns:
        The shares of each token.

    Raises:
        ValueError: no attention was recorded, it is not of the tokens that the workspaces saw (windows, stages of a
            pyramid), a write is missing, or a number is not as above.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, arXiv 2005.00928, section 3; the workspace's
    factor is this library's extension of it.
    """
    recorded = check_trace(NAME, trace)[index]
    attention_weight = check_number(NAME, "attention_weight", attention_weight, "[0, 1]")
    workspace_weight = check_number(NAME, "workspace_weight", workspace_weight, "[0, 1]")
    if batch_share is not None:
        batch_share = check_number(NAME, "batch_share", batch_share, "[0, 1]")
    batch, num_tokens = _check(recorded)
    chosen = choose_images(NAME, images, batch)

    results = []
    for image in chosen:
        # Shares of this image's tokens in all tokens of the batch (N, B, N), from the last layer down.
        shares = torch.zeros(num_tokens, batch, num_tokens, dtype=torch.float64)
        shares[:, image] = torch.eye(num_tokens, dtype=torch.float64)
        memory = torch.zeros(num_tokens, dtype=torch.float64)
        for step in reversed(_steps(recorded)):
            if isinstance(step, AttentionRecord):
                attended = torch.einsum("nbm,bmk->nbk", shares, step.weights.detach().cpu().double())
                shares = torch.lerp(shares, attended, attention_weight)
            else:
                shares, past = _through_workspace(shares, step, workspace_weight, batch_share)
                memory += past
        own = shares[:, image].clone()
        results.append((own, shares.sum((1, 2)) - own.sum(1), memory))
    weights, others, memories = (torch.stack(each).float() for each in zip(*results, strict=True))
    return Rollout(chosen, weights, others.clamp_min(0), memories)


def choose_images(name: str, images: Sequence[int] | int | None, batch: int) -> list[int]:
    """Indices of images, checked against the size of the batch; None is all of them."""
    chosen = list(range(batch)) if images is None else list(images) if isinstance(images, Iterable) else [images]
    for image in chosen:
        if not isinstance(image, int) or isinstance(image, bool) or not -batch <= image < batch:
            raise op_error(name, f"images of the recorded batch, 0 to {batch - 1}", repr(image))
    if not chosen:
        raise op_error(name, "at least one image", "none")
    return [image % batch for image in chosen]


def _steps(recorded: Pass) -> list[AttentionRecord | LayerRecord]:
    """Self-attention and workspaces in the order in which the tokens went through them."""
    steps: list[AttentionRecord | LayerRecord] = []
    layers = list(recorded)
    for number in range(len(layers) + 1):
        steps.extend(each for each in recorded.attention if each.before == number)
        steps.extend(layers[number : number + 1])
    return steps


def _check(recorded: Pass) -> tuple[int, int]:
    """``B`` and ``N``."""
    if not recorded.attention:
        raise op_error(
            NAME,
            "recorded self-attention",
            "none: record a call of the whole model with ait.record(model, attention=True). What is seen is "
            "torch.nn.functional.scaled_dot_product_attention, modules of torch.nn, and a softmax of (B, heads, N, N); "
            "timm.layers.set_fused_attn(True) and attn_implementation='sdpa' (transformers) make models use it",
        )
    sizes = {(layer.batch, layer.tokens_per_image) for layer in recorded}
    sizes |= {(each.weights.shape[0], each.weights.shape[1]) for each in recorded.attention}
    if len(sizes) != 1:
        found = ", ".join(f"{batch} x {tokens}" for batch, tokens in sorted(sizes))
        raise op_error(NAME, "all layers and all self-attention on the same B images of N tokens", found)
    return sizes.pop()


def _through_workspace(
    shares: Tensor, layer: LayerRecord, weight: float, batch_share: float | None
) -> tuple[Tensor, Tensor]:
    """Shares before the workspace from shares after it, ``(N, B, N)``, and what is due to the memory, ``(N,)``."""
    if weight == 0:
        return shares, torch.zeros(shares.shape[0], dtype=shares.dtype)
    in_slots = shares.flatten(1) @ layer.retrieval.detach().cpu().double()  # (N, M)
    kept = layer.write is not None and layer.write.kept
    share = (layer.alpha if kept else 0.0) if batch_share is None else batch_share
    past, after = in_slots.sum(1), (1 - weight) * shares
    if share > 0:
        gates_MT = layer.require_write(NAME).dense_gates().detach().cpu().double().mean(0)
        taken = share * (in_slots @ gates_MT)
        past = past - taken.sum(1)
        after = after + weight * taken.view_as(shares)
    return after, weight * past
