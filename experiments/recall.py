"""Associative recall: patterns are stored, corrupted and retrieved, beside what theory promises.

    python experiments/recall.py                 # about half a minute; writes experiments/results/recall/
    python experiments/recall.py --quick --out /tmp/recall

Four figures and the numbers behind them (recall.json):

- energy: states far from their patterns (noise as long as the pattern) descend in energy, step by step.
- digits: the lower half of handwritten digits is taken away, and comes back.
- capacity: the share of random patterns that one update retrieves, over the number of patterns and beta, with Wilson's
  95 % interval (which takes queries of the same patterns as independent); dashed, the share for which Theorem 5
  promises it; triangles, the number of patterns that Theorem 3 says can be stored.
- error: the retrieval error of single queries and Theorem 5's bound on it.

Patterns are uniform on the sphere of radius ``M = sqrt(d - 1)`` (Theorem 3 with ``K = 1``); a query is a pattern plus
noise of length ``noise * M`` in a uniform direction; it counts as retrieved if the state after one update is within
``tolerance * M`` of the pattern.

Theory (Ramsauer et al., Hopfield Networks is All You Need, arXiv 2008.02217), for N patterns:

- Theorem 5. With the separation ``Delta_i = x_i.x_i - max_j x_i.x_j``, one update f leaves an error of
  ``|f(q) - x_i| <= 2 (N - 1) exp(-beta (Delta_i - 2 max(|q - x_i|, |x_i* - x_i|) M)) M``. Drawn is the same with
  ``|q - x_i|`` in place of the maximum, which is smaller and holds, too: the weights of the other patterns sum to at
  most ``(N - 1) exp(-beta (Delta_i - 2 |q - x_i| M))``, and each moves the result by at most ``2 M``.
- Theorem 3. With probability ``1 - p`` at least ``sqrt(p) c^((d - 1) / 4)`` random patterns can be stored, where
  ``c = b / W0(exp(a + ln b))``, ``a = 2 / (d - 1) (1 + ln(2 beta p (d - 1)))``, ``b = 2 beta / 5``, provided that
  ``c >= (2 / sqrt(p))^(4 / (d - 1))``. Stored means that a sphere around each pattern, of whatever radius, converges to
  one fixed point in it: another notion than a query at a given distance, so the two numbers are set side by side and
  not compared as a test of the theorem.
"""

from __future__ import annotations

import argparse
import io
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from results import environment, git_revision, wilson_interval, write_json
from torch import Tensor

from ait.data import digits
from ait.ops import hopfield_energy, hopfield_retrieve
from ait.viz.style import OKABE_ITO, bare, new_figure, style

RESULTS = Path(__file__).parent / "results" / "recall"
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^v"


@dataclass(frozen=True)
class Settings:
    """What is run."""

    dims: tuple[int, ...] = (16, 32)
    betas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    most_patterns: int = 2**16
    """The numbers of patterns are the powers of 2 up to this."""
    draws: int = 20
    """Sets of random patterns for each number of them."""
    queries: int = 64
    """Of each set; a set of fewer patterns is asked for all of them, each once."""
    noise: float = 0.1
    tolerance: float = 0.1
    failure: float = 0.05
    """``p`` of Theorem 3."""
    steps: int = 6
    seed: int = 0


QUICK = Settings(dims=(8,), betas=(0.5, 4.0), most_patterns=16, draws=2, queries=8, steps=3)


def sphere(count: int, dim: int, radius: float, generator: torch.Generator) -> Tensor:
    """``(count, dim)``, uniform on the sphere, float64."""
    points = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return radius * points / points.norm(dim=-1, keepdim=True)


def update(state: Tensor, patterns: Tensor, beta: float) -> Tensor:
    """One retrieval step. One at a time, since many at once go through the patterns' Gram matrix."""
    return hopfield_retrieve(state, patterns, beta)[0]


def lambert_w(z: float) -> float:
    """The upper branch ``W0`` of the Lambert W function for ``z > 0``: ``w`` with ``w exp(w) = z``."""
    w = math.log1p(z)
    for _ in range(100):  # Newton's method on w + ln w = ln z, which converges from here
        w -= (w + math.log(w) - math.log(z)) * w / (1 + w)
    return w


def theorem_3_c(dim: int, beta: float, p: float, k: float = 1.0) -> float:
    """``c`` of Theorem 3, for patterns of length ``k sqrt(dim - 1)``."""
    a = 2 / (dim - 1) * (1 + math.log(2 * beta * k**2 * p * (dim - 1)))
    b = 2 * k**2 * beta / 5
    return b / lambert_w(math.exp(a + math.log(b)))


def theorem_3(dim: int, beta: float, p: float) -> float | None:
    """The number of patterns that can be stored with probability ``1 - p``; None where its condition does not hold."""
    c = theorem_3_c(dim, beta, p)
    if c < (2 / math.sqrt(p)) ** (4 / (dim - 1)):
        return None
    return math.sqrt(p) * c ** ((dim - 1) / 4)


def theorem_5(patterns: Tensor, wanted: Tensor, queries: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Separation of the wanted patterns ``(Q,)`` and the bound on the error after one update ``(Q,)``.

    Args:
        patterns: ``(N, d)`` of one length ``M``, ``N >= 2``.
        wanted: ``(Q,)``, indices of patterns.
        queries: ``(Q, d)``.
        beta: inverse temperature.
    """
    radius = float(patterns[0].norm())
    similarity = patterns[wanted] @ patterns.T
    own = similarity.gather(1, wanted.unsqueeze(1)).squeeze(1)
    others = similarity.scatter(1, wanted.unsqueeze(1), -math.inf)
    separation = own - others.amax(1)
    distance = (queries - patterns[wanted]).norm(dim=-1)
    exponent = math.log(2 * (len(patterns) - 1) * radius) - beta * (separation - 2 * distance * radius)
    return separation, exponent.clamp_max(700).exp()


def capacity(settings: Settings) -> list[dict[str, Any]]:
    """One entry for each dimension, beta and number of patterns."""
    entries = []
    generator = torch.Generator().manual_seed(settings.seed)
    for dim in settings.dims:
        radius = math.sqrt(dim - 1)
        for count in (2**power for power in range(1, settings.most_patterns.bit_length())):
            within = dict.fromkeys(settings.betas, 0)
            promised = dict.fromkeys(settings.betas, 0)
            asked = 0
            for _ in range(settings.draws):
                patterns = sphere(count, dim, radius, generator)
                wanted = torch.randperm(count, generator=generator)[: settings.queries]
                queries = patterns[wanted] + sphere(len(wanted), dim, settings.noise * radius, generator)
                asked += len(wanted)
                for beta in settings.betas:
                    error = (update(queries, patterns, beta) - patterns[wanted]).norm(dim=-1)
                    within[beta] += int((error <= settings.tolerance * radius).sum())
                    _, bound = theorem_5(patterns, wanted, queries, beta)
                    promised[beta] += int((bound <= settings.tolerance * radius).sum())
                    if bool((error > bound * (1 + 1e-9) + 1e-9).any()):
                        raise AssertionError("recall: an error above the bound of Theorem 5")
            for beta in settings.betas:
                low, high = wilson_interval(within[beta], asked)
                entries.append(
                    {
                        "dim": dim,
                        "beta": beta,
                        "patterns": count,
                        "queries": asked,
                        "retrieved": within[beta],
                        "interval_95": [low, high],
                        "promised_by_theorem_5": promised[beta],
                    }
                )
    return entries


def errors(settings: Settings, dim: int, count: int) -> list[dict[str, Any]]:
    """Error after one update, and its bound, of single queries, for each beta."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    patterns = sphere(count, dim, math.sqrt(dim - 1), generator)
    wanted = torch.randperm(count, generator=generator)[: settings.queries]
    # From no noise to the noise of the capacity runs, so that bounds spread.
    lengths = torch.linspace(0, settings.noise, len(wanted), dtype=torch.float64).unsqueeze(1)
    queries = patterns[wanted] + lengths * sphere(len(wanted), dim, math.sqrt(dim - 1), generator)
    entries = []
    for beta in settings.betas:
        separation, bound = theorem_5(patterns, wanted, queries, beta)
        error = (update(queries, patterns, beta) - patterns[wanted]).norm(dim=-1)
        entries.append(
            {"dim": dim, "patterns": count, "beta": beta, "separation": separation.tolist(), "bound": bound.tolist()}
            | {"error": error.tolist()}
        )
    return entries


def energies(settings: Settings, dim: int, count: int) -> list[dict[str, Any]]:
    """Energy at each step (quantiles over queries) from states with noise as long as a pattern, for each beta."""
    generator = torch.Generator().manual_seed(settings.seed + 2)
    patterns = sphere(count, dim, math.sqrt(dim - 1), generator)
    wanted = torch.randperm(count, generator=generator)[: settings.queries]
    start = patterns[wanted] + sphere(len(wanted), dim, math.sqrt(dim - 1), generator)
    entries = []
    for beta in settings.betas:
        state, path = start, [hopfield_energy(start, patterns, beta)]
        for _ in range(settings.steps):
            state = update(state, patterns, beta)
            path.append(hopfield_energy(state, patterns, beta))
        falls = torch.stack(path)
        if bool((falls.diff(dim=0) > 1e-10 * falls[:-1].abs()).any()):
            raise AssertionError("recall: energy rose")
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        quantiles = torch.quantile(falls, levels, dim=1).T
        entries.append({"dim": dim, "patterns": count, "beta": beta, "quantiles_05_50_95": quantiles.tolist()})
    return entries


def recalled_digits(settings: Settings, beta: float = 1.0) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Ten digits without their lower half among 100 that are stored; their pictures, state by state."""
    train, _ = digits()
    images = train.images.double().flatten(1)
    chosen = torch.cat([torch.nonzero(train.labels == label).flatten()[:10] for label in range(10)])
    patterns = images[chosen]
    centre = patterns.mean(0)
    # Centred and of one length, without which the brightest digit is found for every query.
    length = math.sqrt(patterns.shape[1])
    scale = (patterns - centre).norm(dim=-1, keepdim=True)
    stored = (patterns - centre) / scale * length
    wanted = torch.arange(0, len(stored), 10)
    state = stored[wanted].clone()
    rows = state.view(len(wanted), train.image_shape[1], train.image_shape[2])
    rows[:, train.image_shape[1] // 2 :] = 0
    states, path = [state], [hopfield_energy(state, stored, beta)]
    for _ in range(3):
        states.append(update(states[-1], stored, beta))
        path.append(hopfield_energy(states[-1], stored, beta))
    right = (states[-1] @ stored.T).argmax(1) == wanted
    shown = [((each / length * scale[wanted]) + centre).view_as(rows).numpy() for each in (stored[wanted], *states)]
    entry = {
        "stored": len(stored),
        "beta": beta,
        "asked": len(wanted),
        "recalled": int(right.sum()),
        "mean_energy": [float(each.mean()) for each in path],
    }
    return entry, shown


def draw_energies(entries: list[dict[str, Any]]) -> Figure:
    figure = new_figure(4.5, 3.0)
    axes = figure.subplots()
    for entry, colour, line in zip(entries, OKABE_ITO, STYLES * 2, strict=False):
        low, middle, high = np.array(entry["quantiles_05_50_95"]).T
        axes.fill_between(range(len(middle)), low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(middle, line, color=colour, marker="o", markersize=3, label=f"{entry['beta']:g}")
    axes.set_xlabel("retrieval step")
    axes.set_ylabel("energy")
    axes.set_title(f"{entries[0]['patterns']} patterns in {entries[0]['dim']} dimensions: median, middle 90 %")
    axes.grid(axis="y")
    axes.legend(title="beta")
    return figure


def draw_capacity(entries: list[dict[str, Any]], settings: Settings) -> Figure:
    figure = new_figure(7.0, 3.2)
    panels = figure.subplots(1, len(settings.dims), sharey=True, squeeze=False)[0]
    for axes, dim in zip(panels, settings.dims, strict=True):
        for beta, colour, marker in zip(settings.betas, OKABE_ITO, MARKERS, strict=False):
            chosen = [entry for entry in entries if (entry["dim"], entry["beta"]) == (dim, beta)]
            counts = [entry["patterns"] for entry in chosen]
            low, high = np.array([entry["interval_95"] for entry in chosen]).T
            axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
            share = [entry["retrieved"] / entry["queries"] for entry in chosen]
            axes.plot(counts, share, f"{marker}-", color=colour, markersize=3, label=f"{beta:g}")
            promised = [entry["promised_by_theorem_5"] / entry["queries"] for entry in chosen]
            axes.plot(counts, promised, "--", color=colour, linewidth=1)
            guaranteed = theorem_3(dim, beta, settings.failure)
            if guaranteed is not None:
                axes.plot([guaranteed], [1.06], "v", color=colour, markersize=6, clip_on=False)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.12)
        axes.set_xlabel("patterns stored, N")
        axes.set_title(f"{dim} dimensions")
        axes.grid(axis="y")
    panels[0].set_ylabel("share retrieved by one update")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", title="beta")
    figure.supxlabel("dashed: promised by Theorem 5; triangles above: N of Theorem 3, where it applies", fontsize=7)
    return figure


def draw_errors(entries: list[dict[str, Any]]) -> Figure:
    figure = new_figure(4.5, 3.4)
    axes = figure.subplots()
    for entry, colour, marker in zip(entries, OKABE_ITO, MARKERS, strict=False):
        points = dict(marker=marker, linestyle="", color=colour, markersize=3, alpha=0.8)
        axes.plot(entry["bound"], entry["error"], label=f"{entry['beta']:g}", zorder=0.5, **points)
    axes.set_rasterization_zorder(1)  # the points become one picture
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    below = min(min(entry["error"]) for entry in entries)
    axes.plot([low, high], [low, high], color=axes.spines["left"].get_edgecolor(), linewidth=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(below / 3, 100)
    axes.set_xlabel("bound of Theorem 5 (line: error = bound)")
    axes.set_ylabel("error after one update")
    axes.set_title(f"{entries[0]['patterns']} patterns in {entries[0]['dim']} dimensions")
    axes.legend(title="beta", loc="lower right")
    return figure


def draw_digits(shown: list[np.ndarray], entry: dict[str, Any]) -> Figure:
    names = ["stored", "query", *(f"step {step}" for step in range(1, len(shown) - 1))]
    figure = new_figure(6.0, 3.4)
    panels = figure.subplots(len(shown), 1)
    for axes, name, pictures in zip(panels, names, shown, strict=True):
        # One strip a state, with a column of nothing after each picture.
        strip = np.pad(pictures, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
        strip = np.concatenate(list(strip), axis=1)[:, :-1]
        axes.imshow(strip, cmap="cividis", vmin=shown[0].min(), vmax=shown[0].max(), interpolation="nearest")
        bare(axes)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(f"{entry['recalled']} of {entry['asked']} recalled among {entry['stored']}", fontsize=9)
    return figure


def save_svg(figure: Figure, path: Path) -> None:
    """Writes a small file: text as text, coordinates to a hundredth of a point, few lines."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None}, dpi=160)
    text = re.sub(r"(-?\d+\.\d\d)\d+", r"\1", content.getvalue())
    path.write_text(re.sub(r" *\n *", " ", text).replace("> <", ">\n<"), encoding="utf-8")


def main(out: Path, settings: Settings) -> dict[str, Any]:
    """Runs everything, and writes ``recall.json`` and four SVGs."""
    out.mkdir(parents=True, exist_ok=True)
    dim, count = settings.dims[0], min(256, settings.most_patterns)
    digit_entry, shown = recalled_digits(settings)
    guaranteed = [
        {"dim": each, "beta": beta, "p": settings.failure, "patterns": theorem_3(each, beta, settings.failure)}
        for each in settings.dims
        for beta in settings.betas
    ]
    content = {
        "settings": asdict(settings),
        "theorem_3": guaranteed,
        "capacity": capacity(settings),
        "errors": errors(settings, dim, count),
        "energies": energies(settings, dim, count),
        "digits": digit_entry,
        "environment": environment(),
        "git_revision": git_revision(),
    }
    write_json(out / "recall.json", content)
    with style("transparent"):
        figures = {
            "energy": draw_energies(content["energies"]),
            "capacity": draw_capacity(content["capacity"], settings),
            "error": draw_errors(content["errors"]),
            "digits": draw_digits(shown, digit_entry),
        }
        for name, figure in figures.items():
            save_svg(figure, out / f"{name}.svg")
    return content


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Associative recall, beside theory.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="few patterns, for a test")
    arguments = parser.parse_args()
    summary = main(arguments.out, QUICK if arguments.quick else Settings())
    print(f"recall: {summary['digits']['recalled']} of {summary['digits']['asked']} digits; results in {arguments.out}")
