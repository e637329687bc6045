"""Times the whole write against T, k, M and E, beside plain PyTorch, and draws the four curves as one SVG.

    python experiments/bench/sweep.py --out experiments/results/sweep

Writes ``OUT.json`` (median and quartiles of every point), ``OUT.md`` (the same as a table) and ``OUT.svg``. One
quantity moves at a time, the others stay at those of ``base``; forward and backward, float32, by turns in one process.
The baselines run as they are, not compiled.
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
from operators import headline, machine
from timing import LARGE_RESULTS, Spread, by_turns
from workloads import Problem, Shape

from ait._C import run_fma_peak

Point = dict[str, Any]  # one value of what moves, the seconds and the ratios measured there

SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (512, 2048, 8192, 32768),
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

    out: Path = Path("runs/sweep")
    """Where to write, without suffix."""
    rounds: int = 3
    """Rounds of each point."""
    threads: int | None = None
    """Threads; torch's default otherwise."""
    base: Shape = dataclasses.field(default_factory=lambda: Shape(tokens=8192))
    """The shape around which each quantity moves."""


def measure(shape: Shape, rounds: int) -> Point:
    """Seconds of forward and backward, by implementation, and how many times as long as ours each takes."""
    problem = Problem(shape)
    timed = by_turns(
        {
            "ait": problem.forward_and_backward(baselines.ours_write),
            "batched": problem.forward_and_backward(baselines.batched_write),
            "published": problem.forward_and_backward(baselines.published_write),
            "limit": lambda: run_fma_peak(shape.product_flops),
        },
        rounds,
        touched_bytes=LARGE_RESULTS,
    )
    seconds = {name: dataclasses.asdict(timed.time(name)) for name in STYLES}
    return {"seconds": seconds, "ratios": {name: dataclasses.asdict(timed.ratio(name, "ait")) for name in STYLES}}


def table(sweeps: dict[str, list[Point]], about: dict[str, Any], base: Shape) -> str:
    """All points as Markdown: milliseconds, and ratios with their quartiles."""
    others = [name for name in STYLES if name != "ait"]
    header = ["", "ait (ms)", *(f"{STYLES[name][2]}: times as long" for name in others)]
    lines = [f"{headline(about)}; around {base}", "", f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for quantity, points in sweeps.items():
        for point in points:
            ratios = [str(Spread(**point["ratios"][name])) for name in others]
            milliseconds = f"{1e3 * point['seconds']['ait']['median']:.3g}"
            lines.append(f"| {LABELS[quantity]} = {point['value']:,} | {milliseconds} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def draw(sweeps: dict[str, list[Point]], about: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(SWEEPS), sharey=True)
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
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STYLES), frameon=False)
    figure.suptitle(
        f"{about['processor']}, {about['threads']} threads, {about['instruction set'].partition(' (')[0]}, float32"
    )
    figure.savefig(path)


def main(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    about = machine()
    sweeps: dict[str, list[Point]] = {}
    for quantity, values in SWEEPS.items():
        sweeps[quantity] = []
        for value in values:
            point = measure(dataclasses.replace(config.base, **{quantity: value}), config.rounds)
            milliseconds, ratio = 1e3 * point["seconds"]["ait"]["median"], point["ratios"]["batched"]["median"]
            print(f"{LABELS[quantity]:<14} {value:>6}: {milliseconds:9.2f} ms, batched {ratio:.2f}x", flush=True)
            sweeps[quantity].append({"value": value, **point})
    config.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "base": dataclasses.asdict(config.base), "sweeps": sweeps}
    config.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    config.out.with_suffix(".md").write_text(table(sweeps, about, config.base))
    draw(sweeps, about, config.out.with_suffix(".svg"))
    print(f"written to {config.out.with_suffix('.json')}, .md and .svg")


if __name__ == "__main__":
    main(tyro.cli(Config))
