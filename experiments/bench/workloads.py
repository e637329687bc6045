"""What the benchmarks run on: shapes, random problems, training steps, logits that are hard on a selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import ait
from ait.nn.writer import BottleneckWriter


@dataclass(frozen=True)
class Shape:
    tokens: int = 32768  # T
    dim: int = 768  # E
    num_slots: int = 32  # M
    slot_dim: int = 32  # D
    num_heads: int = 8  # S
    k: int = 512

    @property
    def product_flops(self) -> float:
        """``2*T*E*R``: the one big product of the write."""
        return 2.0 * self.tokens * self.dim * self.num_heads * self.num_slots

    def __str__(self) -> str:
        return f"T={self.tokens} E={self.dim} M={self.num_slots} D={self.slot_dim} S={self.num_heads} k={self.k}"


@dataclass
class Problem:
    """The write at one shape: weights, memory and tokens, all random."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    writer: BottleneckWriter = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        shape = self.shape
        self.writer = BottleneckWriter(
            shape.dim,
            num_slots=shape.num_slots,
            slot_dim=shape.slot_dim,
            num_heads=shape.num_heads,
            dropout=0.0,
            selection_dtype=None,
        )
        self.memory = torch.nn.functional.normalize(torch.randn(shape.num_slots, shape.slot_dim), dim=-1)
        self.tokens = torch.randn(shape.tokens, shape.dim).to(self.dtype)

    def forward(self, write: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return write(self.writer, self.memory, self.tokens, self.shape.k)

        return run

    def forward_and_backward(self, write: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        memory, tokens = self.memory.clone().requires_grad_(), self.tokens.clone().requires_grad_()

        def run() -> object:
            candidate, loss = write(self.writer, memory, tokens, self.shape.k)
            (candidate.square().sum() + loss).backward()
            grad = tokens.grad
            memory.grad = tokens.grad = None
            self.writer.zero_grad()
            return grad

        return run


def distributions(tokens: int, rows: int) -> dict[str, torch.Tensor]:
    """Logits ``(T, R)`` that are hard on a selection, and normal ones."""
    torch.manual_seed(0)
    ramp = torch.arange(tokens, dtype=torch.float32).unsqueeze(1).expand(tokens, rows).contiguous()
    one_giant = torch.zeros(tokens, rows)
    one_giant[tokens // 2] = 1e30
    return {
        "normal": torch.randn(tokens, rows),
        "all equal": torch.ones(tokens, rows),
        "equal high bits": 1 + torch.rand(tokens, rows) * 2**-12,
        "ascending": ramp,
        "descending": -ramp,
        "one giant": one_giant,
        "denormal": torch.rand(tokens, rows) * 1e-40,
        "NaN": torch.full((tokens, rows), torch.nan),
    }


def training_step(model: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], object]:
    has_workspace = any(isinstance(module, ait.GlobalWorkspaceLayer) for module in model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> object:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        if has_workspace:
            loss = loss + ait.balance_loss(model)
        loss.backward()
        return optimizer.step()

    return run
