"""The layer, written from its equations for the tests: one head at a time, dense, in the dtype of what it is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Direct:
    """What one training pass gives."""

    output: Tensor
    balance_loss: Tensor
    memory: Tensor
    gates: Tensor  # (S, M, T)


def unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def squared_variation(values: Tensor) -> Tensor:
    if values.numel() < 2:
        return values.sum() * 0
    return values.var(unbiased=True) / (values.mean() ** 2 + 1e-10)


def feed_forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = x @ weights["fc1.weight"].T + weights["fc1.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    f = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    deviation = f - f.mean(-1, keepdim=True)
    normal = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normal * weights["norm.weight"] + weights["norm.bias"]


def bottleneck_gates(logits: Tensor, k: int, ignored: Tensor) -> Tensor:
    """``logits (M, T)``: the softmax of each row over its ``k`` largest, and exactly 0 elsewhere."""
    gates = torch.zeros_like(logits)
    open_tokens = torch.nonzero(~ignored).flatten()
    for slot, row in enumerate(logits):
        kept = open_tokens[row[open_tokens].topk(min(k, len(open_tokens))).indices]
        gates[slot, kept] = torch.softmax(row[kept], dim=0)
    return gates


def direct_layer(
    weights: Mapping[str, Tensor],
    x: Tensor,
    *,
    num_heads: int,
    k: int,
    mask: Tensor | None = None,
    alpha: float = 0.1,
    beta: float = 1.0,
    steps: int = 1,
    sigma: float = 1e-2,
    dropout: float = 0.0,
    writes: bool = True,
) -> Direct:
    """``GlobalWorkspaceLayer`` with ``semantics="differentiable"`` and a Hopfield reader.

    ``weights`` is the layer's state dict, or its parameters and memory by name.
    """
    f = feed_forward(weights, x)
    tokens = f.reshape(-1, f.shape[-1])
    ignored = torch.zeros(len(tokens), dtype=torch.bool) if mask is None else mask.flatten()
    gamma = unit_rows(weights["workspace.memory.gamma"])
    slot_dim = gamma.shape[1]
    loss, all_gates = tokens.new_zeros(()), []
    if writes:
        w_q, w_k, w_v, w_o = (weights[f"workspace.writer.{n}.weight"] for n in ("query", "key", "value", "out"))
        answers = []
        for head in range(num_heads):
            rows = slice(head * slot_dim, (head + 1) * slot_dim)
            query, key, value = gamma @ w_q[rows].T, tokens @ w_k[rows].T, tokens @ w_v[rows].T
            gates = bottleneck_gates(query @ key.T / math.sqrt(slot_dim), k, ignored)
            answers.append(gates @ value)
            importance, load = gates.sum(0)[~ignored], (gates > 0).sum(0)[~ignored].to(gates.dtype)
            loss = loss + sigma * (squared_variation(importance) + squared_variation(load))
            all_gates.append(gates)
        answer = F.dropout(torch.cat(answers, dim=1) @ w_o.T, dropout) + gamma
        deviation = answer - answer.mean(-1, keepdim=True)
        normal = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        gamma_hat = normal * weights["workspace.writer.norm.weight"] + weights["workspace.writer.norm.bias"]
        gamma = unit_rows((1 - alpha) * gamma + alpha * gamma_hat)
    patterns = gamma @ weights["workspace.reader.proj.weight"].T + weights["workspace.reader.proj.bias"]
    retrieved = tokens
    for _ in range(steps):
        retrieved = torch.softmax(beta * (retrieved @ patterns.T), dim=-1) @ patterns
    return Direct(
        output=retrieved.reshape(f.shape) + f,
        balance_loss=loss,
        memory=gamma.detach(),
        gates=torch.stack(all_gates) if all_gates else tokens.new_zeros(0),
    )
