"""What an experiment records besides its learning curve, and the table that is made of it.

    python experiments/results.py experiments/results/*/result.json

prints a Markdown table, one line a run (with questions: a second one by their kind), and says of every two runs on the
same data how much better the one is: by the difference on the same images, or, of runs that did not keep which of their
answers were right, by whether their intervals overlap.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from run_folder import write_atomically

import ait

NORMAL_QUANTILE_975 = 1.959963984540054


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion.

    Args:
        correct: successes, in ``[0, total]``.
        total: trials, at least 1.

    Raises:
        ValueError: the numbers are not as above.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"wilson_interval: expected 0 <= correct <= total and total >= 1, got {correct} of {total}")
    z2, share = NORMAL_QUANTILE_975**2, correct / total
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_QUANTILE_975 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # At the ends the exact bounds are 0 and 1, which rounding may miss.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == total else middle + half
    return low, high


def intervals_overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(a[0], b[0]) <= min(a[1], b[1])


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """How much larger the first of two shares is that were counted on the same images, and its 95 % interval.

    What both got right, or both wrong, says nothing of the difference, and the interval is narrower for it than two
    separate intervals suggest.

    Args:
        first: ``(n,)`` bool, which images the first model got right.
        second: the same of the second.

    Returns:
        Share of the first less that of the second, and the ends of its interval.

    Raises:
        ValueError: they are not of the same images.

    Source: A. Agresti and Y. Min, Simple improved confidence intervals for comparing matched proportions, Statistics in
    Medicine 24, 2005 (half an image more in each cell of the two by two table).
    """
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"paired_difference: expected the same images twice, got {first.shape} and {second.shape}")
    total, gained, lost = first.size, int((first & ~second).sum()), int((second & ~first).sum())
    middle = (gained - lost) / (total + 2)
    half = NORMAL_QUANTILE_975 * math.sqrt((gained + lost + 1) / (total + 2) - middle**2) / math.sqrt(total + 2)
    return (gained - lost) / total, max(middle - half, -1.0), min(middle + half, 1.0)


def pack_right(right: Any) -> str:
    """Which answers were right, ``(n,)`` bool, as a string for ``result.json``: one bit an image, in hexadecimal."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def unpack_right(packed: str, total: int) -> np.ndarray:
    """What :func:`pack_right` packed, ``(total,)`` bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8), count=total).astype(bool)


def comparison(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """A sentence on two results: which is better, or that no difference was shown; image by image where it can be."""
    if "test_right" in a and "test_right" in b and a["test_images"] == b["test_images"]:
        first, second = (unpack_right(each["test_right"], each["test_images"]) for each in (a, b))
        points, low, high = (100 * value for value in paired_difference(first, second))
        gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
        verdict = "no difference shown" if low <= 0 <= high else f"{(a if points > 0 else b)['run']} is better on them"
        return (
            f"{a['run']} less {b['run']}: {points:+.2f} points, 95 % interval {low:.2f} to {high:.2f}, on the same "
            "images\n"
            f"({gained:,} of {first.size:,} right in the first alone, {lost:,} in the second alone): {verdict}"
        )
    if intervals_overlap(a["test_interval_95"], b["test_interval_95"]):
        return f"{a['run']} and {b['run']}: no difference shown (the 95 % intervals overlap)"
    better, worse = (a, b) if a["test_accuracy"] > b["test_accuracy"] else (b, a)
    return f"{better['run']} is better than {worse['run']} (the 95 % intervals do not overlap)"


def environment() -> dict[str, Any]:
    """Versions, kernels and threads in use, and the processor."""
    return {**(ait.show_config("dicts") or {}), "cpu": _cpu_name(), "system": platform.system()}


def git_revision() -> str | None:
    """The commit of the checkout that this file is in, with ``+`` where files were changed since; None without git."""
    command = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if changes.stdout else "")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object, one line a key: short, and kind to diffs; never half of it."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_atomically(path, lambda file: file.write(f"{{\n{lines}\n}}\n".encode()))


def read_result(path: Path) -> dict[str, Any]:
    """Reads a ``result.json``.

    Raises:
        FileNotFoundError: there is none; a run writes it when it has finished.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"results: no {path}; a run writes it when it has finished")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"results: {path}: expected the result.json of a run, got {error}") from error
    missing = REQUIRED - result.keys() if isinstance(result, dict) else REQUIRED
    if missing:
        raise ValueError(f"results: {path}: expected the result.json of a run, got no {', '.join(sorted(missing))}")
    return result


REQUIRED = {
    "run",
    "model",
    "data",
    "parameters",
    "test_accuracy",
    "test_interval_95",
    "validation_accuracy",
    "epochs",
    "images_per_second",
    "seconds",
    "environment",
}


def markdown_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a run."""
    header = (
        "run",
        "data",
        "parameters",
        "epochs",
        "validation %",
        "test %",
        "95 % interval",
        "images/s",
        "minutes",
        "threads",
    )
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "--:|" * (len(header) - 2)]
    for result in results:
        low, high = result["test_interval_95"]
        cells = (
            result["run"],
            result["data"],
            f"{result['parameters']:,}",
            str(result["epochs"]),
            f"{100 * result['validation_accuracy']:.2f}",
            f"{100 * result['test_accuracy']:.2f}",
            f"{100 * low:.2f} to {100 * high:.2f}",
            f"{result['images_per_second']:,.0f}",
            f"{result['seconds'] / 60:.1f}",
            str(result["environment"]["threads"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kinds_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a run and kind of question; empty where no run has questions."""
    header = ("run", "questions", "test %", "95 % interval", "best without images %", "one answer always %")
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "--:|" * (len(header) - 2)]
    for result in results:
        for kind, each in result.get("test_by_kind", {}).items():
            low, high = each["interval_95"]
            cells = (
                result["run"],
                kind,
                f"{100 * each['accuracy']:.2f}",
                f"{100 * low:.2f} to {100 * high:.2f}",
                f"{100 * each['question_only_accuracy']:.2f}",
                f"{100 * each['majority_accuracy']:.2f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(paths: Sequence[str]) -> None:
    if not paths:
        raise SystemExit("usage: python experiments/results.py RESULT_JSON...")
    try:
        results = [read_result(Path(path)) for path in paths]
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(markdown_table(results))
    print()
    if kinds := kinds_table(results):
        print(kinds)
        print()
    for a, b in combinations(results, 2):
        if a["data"] == b["data"]:
            print(f"- {a['data']}: {comparison(a, b)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
