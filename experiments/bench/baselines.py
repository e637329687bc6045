"""What a user would write without this library: the write and the retrieval in plain PyTorch.

All take the weights of an :class:`ait.nn.BottleneckWriter`, so that they compute the same thing; tests compare them.
Shapes: ``T`` tokens, ``E`` width, ``M`` slots, ``D`` slot width, ``S`` heads, ``k`` capacity.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ait.nn.writer import BottleneckWriter
from ait.ops.balance_loss import balance_of

BALANCE_WEIGHT = 1e-2


def ours_write(writer: BottleneckWriter, memory: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``gamma_hat (M, D)`` and the balance loss, with the operators of this library."""
    write = writer(memory, tokens, None, k, training=False)
    loss = balance_of(write.gates, write.indices, None, tokens.shape[0], writer.num_heads, BALANCE_WEIGHT)
    return write.candidate, loss


def batched_write(writer: BottleneckWriter, memory: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The clean way: all heads at once, top-k, softmax, scatter into dense gates, matmul."""
    (num_tokens, _), num_heads, slot_dim = tokens.shape, writer.num_heads, writer.slot_dim
    query_SMD = writer.query(memory).view(-1, num_heads, slot_dim).transpose(0, 1)
    key_SDT = writer.key(tokens).view(num_tokens, num_heads, slot_dim).permute(1, 2, 0)
    value_STD = writer.value(tokens).view(num_tokens, num_heads, slot_dim).transpose(0, 1)
    logits_SMT = query_SMD @ key_SDT / math.sqrt(slot_dim)
    kept, indices = logits_SMT.topk(min(k, num_tokens), dim=-1, sorted=False)
    gates_SMT = torch.zeros_like(logits_SMT).scatter(-1, indices, torch.softmax(kept, dim=-1))
    pooled_MSD = (gates_SMT @ value_STD).transpose(0, 1)
    return _candidate(writer, memory, pooled_MSD), _balance_loss(gates_SMT)


def published_write(writer: BottleneckWriter, memory: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The way of the authors' released code: one head at a time, each from the logits of all heads, by top-(k+1)."""
    (num_tokens, _), num_heads, slot_dim = tokens.shape, writer.num_heads, writer.slot_dim
    width = min(k, num_tokens)
    heads, loss = [], memory.new_zeros(())
    for head in range(num_heads):
        query_SMD = writer.query(memory).view(-1, num_heads, slot_dim).transpose(0, 1)
        key_SDT = writer.key(tokens).view(num_tokens, num_heads, slot_dim).permute(1, 2, 0)
        value_STD = writer.value(tokens).view(num_tokens, num_heads, slot_dim).transpose(0, 1)
        logits_MT = (query_SMD @ key_SDT / math.sqrt(slot_dim))[head]
        top, indices = logits_MT.topk(min(k + 1, num_tokens), dim=-1)
        gates = torch.softmax(top[:, :width], dim=-1)
        gates_MT = torch.zeros_like(logits_MT).scatter(-1, indices[:, :width], gates)
        heads.append(gates_MT @ value_STD[head])
        loss = loss + _balance_loss(gates_MT.unsqueeze(0))
    return _candidate(writer, memory, torch.stack(heads, dim=1)), loss


def _candidate(writer: BottleneckWriter, memory: Tensor, pooled_MSD: Tensor) -> Tensor:
    return writer.norm(writer.out(pooled_MSD.flatten(1)) + memory)


def _balance_loss(gates_SMT: Tensor) -> Tensor:
    importance, load = gates_SMT.sum(1), (gates_SMT > 0).to(gates_SMT.dtype).sum(1)
    variation = sum(v.var(-1) / (v.mean(-1).square() + 1e-10) for v in (importance, load))
    return BALANCE_WEIGHT * variation.sum()


def plain_retrieve(state: Tensor, patterns: Tensor, beta: float, steps: int) -> Tensor:
    """Hopfield retrieval as its equation reads: every step goes through all ``E`` dimensions."""
    for _ in range(steps):
        state = torch.softmax(beta * (state @ patterns.T), dim=-1) @ patterns
    return state


def gram_retrieve(state: Tensor, patterns: Tensor, beta: float, steps: int) -> Tensor:
    """The same, with the steps after the first in ``M`` dimensions."""
    gram = patterns @ patterns.T
    weights = torch.softmax(beta * (state @ patterns.T), dim=-1)
    for _ in range(steps - 1):
        weights = torch.softmax(beta * (weights @ gram), dim=-1)
    return F.linear(weights, patterns.T)
