"""How far the gates of inserted workspaces open, at the rate of everything else and at twenty times that.

    python experiments/gates.py

The host is vit_tiny with its CIFAR-10 weights, frozen; workspaces in all blocks and a new classifier learn handwritten
digits by AdamW at 1e-3. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import ait
from ait.data import digits, normalize

BATCH, RATE = 32, 1e-3
TIMES = (1, 20)


def load_digits() -> tuple[Tensor, Tensor]:
    """Training digits as the host takes them, ``(n, 3, 32, 32)``, and their labels."""
    config = ait.pretrained_config("vit_tiny.cifar10")
    train = digits()[0]
    large = F.interpolate(train.images.float(), size=32, mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    return normalize(large, config.mean, config.std), train.labels


def opened(images: Tensor, labels: Tensor, times: float, seed: int, steps: int) -> Tensor:
    """Trains for ``steps`` steps, the gates at ``times`` the rate, and returns how far each is from 0."""
    torch.manual_seed(seed)
    model = ait.create_model("vit_tiny", pretrained="cifar10", num_classes=10)
    ait.insert_workspace(model, layers="all", num_slots=16)
    ait.freeze_backbone(model)
    gates = [inserted.gate for _, inserted in ait.workspaces(model)]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is gate for gate in gates)]
    groups = [{"params": others}, {"params": gates, "lr": times * RATE, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen]) + ait.balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat(gates).detach().abs()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    if min(options.steps, options.seeds) < 1:
        parser.error(f"expected at least one step and one seed, got {options.steps} and {options.seeds}")
    torch.set_num_threads(1)  # enough for so little, and sums come out the same on machines with more cores
    images, labels = load_digits()
    for times in TIMES:
        found = torch.cat([opened(images, labels, times, seed, options.steps) for seed in range(options.seeds)])
        print(
            f"gates at {times:2} x {RATE:g}, {options.steps} steps: |g| {found.mean():.3f} on average, "
            f"{found.min():.3f} to {found.max():.3f} ({len(found)} gates, {options.seeds} seeds)"
        )


if __name__ == "__main__":
    main()
