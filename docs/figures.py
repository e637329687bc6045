"""Draws the figures of the documentation with ``ait.viz``, into ``docs/figures/``.

    python docs/figures.py

Input is generated: Sort-of-CLEVR's pictures of coloured shapes at 32 x 32 pixels, seen by the shipped CIFAR-10 weights,
which never saw such pictures; and, for the memory over training, scikit-learn's handwritten digits. Needs the extras
``[data]``, ``[pretrained]`` and ``[viz]``, and about three minutes of processor time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import ait
from ait import viz
from ait.data import digits, sort_of_clevr

FOLDER = Path(__file__).with_name("figures")
LAYER = "blocks.1"


def pictures(count: int) -> Tensor:
    """``(count, 3, 32, 32)`` in [0, 1], each of another scene."""
    data = sort_of_clevr(count, seed=0)
    return F.interpolate(data.images.float() / 255, size=32, mode="bilinear", antialias=True).clamp(0, 1)


def record(images: Tensor) -> ait.Trace:
    """What the workspaces of the shipped weights do to them, in evaluation."""
    model = ait.create_model("ait_tiny", pretrained="cifar10").eval()
    config = ait.pretrained_config("ait_tiny.cifar10")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    with torch.no_grad(), ait.record(model, attention=True, energy_steps=6) as trace:
        model((images - mean) / std)
    return trace


def train(steps: int) -> ait.MemoryHistory:
    """The memory of a small model that learns handwritten digits."""
    torch.manual_seed(0)
    data, _ = digits()
    images = (data.images.float() / 255 - 0.5) / 0.5
    model = ait.create_model("ait_tiny", img_size=8, patch_size=2, in_chans=1, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = ait.MemoryHistory(model, every=max(1, steps // 30))
    for step in range(steps + 1):
        history.log(step)
        chosen = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[chosen]), data.labels[chosen]) + ait.balance_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return history


def draw(steps: int = 300) -> dict[str, Figure]:
    """The figures by name."""
    images = pictures(16)
    trace = record(images)
    shown = [0, 5, 9]
    theme = "transparent"
    return {
        "slots": viz.plot_slots(trace, images, layer=LAYER, image=shown, theme=theme),
        "retrieval": viz.plot_retrieval(trace, images, layer=LAYER, image=shown[:2], theme=theme),
        "slot-use": viz.plot_slot_use(trace, theme=theme),
        "energy": viz.plot_energy(trace, theme=theme),
        "rollout": viz.plot_rollout(trace, images, image=shown[:2], batch_share=1.0, theme=theme),
        "memory": viz.plot_memory(train(steps), layer="blocks.1", theme=theme),
    }


def main(out: Path = FOLDER, steps: int = 300) -> None:
    """Writes the figures as PNG with a transparent ground, for light and dark pages."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(steps).items():
        figure.savefig(out / f"{name}.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the figures of the documentation.")
    parser.add_argument("--out", type=Path, default=FOLDER)
    main(parser.parse_args().out)
