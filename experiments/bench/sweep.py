"""Times the whole write against T, k, M and E, beside plain PyTorch, and draws the four curves as one SVG.

    python experiments/bench/sweep.py --out experiments/results/write-sweep

Writes ``OUT.json`` (median and quartiles of every point) and ``OUT.svg``. One quantity moves at a time, the others stay
at the values of the default shape; forward and backward, float32, by turns in one process.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import torch
import tyro
from operators import machine
from timing import by_turns
from workloads import Problem, Shape

from ait._C import run_fma_peak

SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (256, 1024, 4096, 16384, 65536),
    "k": (16, 64, 256, 1024, 4096),
    "num_slots": (8, 16, 32, 64, 128),
    "dim": (64, 192, 384, 768, 1536),
}
LABELS = {"tokens": "tokens T", "k": "capacity k", "num_slots": "slots M", "dim": "token width E"}
# Okabe and Ito's colours, told apart by everyone.
STYLES = {
    "ait": ("#0072B2", "o", "ait"),
    "batched": ("#E69F00", "s", "batched heads, PyTorch"),
    "published": ("#CC79A7", "^", "published loop, PyTorch"),
    "limit": ("#999999", None, "limit: one product at peak (P)"),
}


@dataclass
class Config:
    """What to sweep."""

    out: Path = Path("runs/write-sweep")
    """Where to write, without suffix."""
    rounds: int = 5
    """Rounds of each point."""
    threads: int | None = None
    """Threads; torch's default otherwise."""
    base: Shape = dataclasses.field(default_factory=lambda: Shape(tokens=8192))
    """The shape around which each quantity moves."""


def measure(shape: Shape, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward, by implementation."""
    problem = Problem(shape)
    timed = by_turns(
        {
            "ait": problem.forward_and_backward(baselines.ours_write),
            "batched": problem.forward_and_backward(baselines.batched_write),
            "published": problem.forward_and_backward(baselines.published_write),
            "limit": lambda: run_fma_peak(shape.product_flops),
        },
        rounds,
    )
    return {name: dataclasses.asdict(timed.time(name)) for name in STYLES}


def draw(sweeps: dict[str, list[dict[str, Any]]], about: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, (quantity, points) in zip(axes, sweeps.items(), strict=True):
        positions = [point["value"] for point in points]
        for name, (color, marker, label) in STYLES.items():
            seconds = [point["seconds"][name] for point in points]
            medians = [1e3 * each["median"] for each in seconds]
            style = "--" if marker is None else "-"
            axis.plot(positions, medians, style, color=color, marker=marker, markersize=4, label=label)
            low, high = [1e3 * each["low"] for each in seconds], [1e3 * each["high"] for each in seconds]
            axis.fill_between(positions, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=LABELS[quantity])
        axis.set_xticks(positions, [f"{position:,}" for position in positions])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("write, forward + backward (ms)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{about['processor']}, {about['threads']} threads, {about['instruction set'].split()[0]}, float32")
    figure.savefig(path)


def main(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for quantity, values in SWEEPS.items():
        sweeps[quantity] = []
        for value in values:
            seconds = measure(dataclasses.replace(config.base, **{quantity: value}), config.rounds)
            ratio = seconds["batched"]["median"] / seconds["ait"]["median"]
            print(f"{LABELS[quantity]:<14} {value:>6}: {1e3 * seconds['ait']['median']:9.2f} ms, batched {ratio:.2f}x")
            sweeps[quantity].append({"value": value, "seconds": seconds})
    about = machine()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "base": dataclasses.asdict(config.base), "sweeps": sweeps}
    config.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(sweeps, about, config.out.with_suffix(".svg"))
    print(f"written to {config.out.with_suffix('.json')} and .svg")


if __name__ == "__main__":
    main(tyro.cli(Config))
