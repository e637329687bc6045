"""Builds the CUDA kernels, tests them on this machine's GPU, measures them, and writes a report.

    make gpu-check                                  # or: python experiments/bench/gpu_check.py --help

It needs an NVIDIA GPU with its driver, a torch built for CUDA, and a CUDA toolkit of the same major version (which
brings compute-sanitizer). The report (JSON) holds versions, the outcome of the tests and of compute-sanitizer, and
medians of the times of the operators at the default shape, with ratios to plain PyTorch, torch.compile and the
published loop, the fraction of the floor that was reached, and the design's targets. Times are the device's: what the
host takes to issue a call is no part of them. The report is written before anything is timed, and again at the end.

Exit status of this script: 0 where all that was asked for ran and passed, 1 where something failed or the machine
lacks what it needs, 2 where all that ran passed, but something could not be run ("incomplete"; the report says what).
``make`` itself ends with 2 wherever the script does not end with 0; the last line that the script prints, and
``result`` in the report, tell the two apart.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpu_workloads import Workload, measured_rates, milliseconds, peak_bytes, workloads  # noqa: E402
from timing import Spread  # noqa: E402

from setup_cuda import Toolkit, find_toolkit  # noqa: E402
from tests.cuda_on_host.selections import LEFT_OUT, SELECTIONS, STOPS_THE_DEVICE  # noqa: E402

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# No CUDA graphs: the sanitizer runs without torch's cache of memory, and what is captured must not allocate.
SANITIZER_TESTS = "(float32 or bfloat16 or special) and not graph"


@dataclass
class Config:
    """What to run."""

    build: bool = True
    """Build the kernels first, for this machine's GPU."""
    tests: bool = True
    """Run tests/gpu, and the operators' own tests on the device."""
    sanitizer: bool = True
    """Run a few of them under compute-sanitizer; where it is not installed, the check is incomplete."""
    rounds: int = 20
    """Rounds of each comparison; 0 measures nothing."""
    bandwidth: float | None = None
    """Bandwidth of the GPU's memory in bytes a second; measured by copying where it is not given."""
    flops: float | None = None
    """Operations of bfloat16 a second; measured by a large product where it is not given."""
    out: Path = Path("gpu_check.json")
    """Report file."""


class Target(NamedTuple):
    """A design target for an H200: ``quantity`` of the row ``row`` is at most, or at least, ``limit``."""

    row: str
    quantity: str
    limit: float
    at_least: bool = False


TARGETS = (
    Target("write, bfloat16", "ait_us", 130.0),
    Target("write, float32", "ait_us", 450.0),
    Target("write, backward, bfloat16", "ait_us", 120.0),
    Target("selection of ready logits, float32", "ait_us", 25.0),
    Target("write, forward and backward, bfloat16", "ratio compiled", 4.0, at_least=True),
    Target("write, forward and backward, bfloat16", "ratio published loop", 15.0, at_least=True),
    Target("write, forward and backward, bfloat16", "extra_bytes", 40e6),
)


class Outcome(NamedTuple):
    """How a step ended."""

    passed: bool
    summary: str
    output: str  # its end


def missing_requirements(config: Config) -> list[str]:
    """What this machine lacks, in words; nothing where everything can run."""
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a torch built for CUDA (this is torch {torch.__version__}, without it)")
    if not torch.cuda.is_available():
        missing.append("an NVIDIA GPU and its driver (torch.cuda.is_available() is False)")
    if config.build:
        toolkit = find_toolkit()
        if isinstance(toolkit, str):
            missing.append(f"a CUDA toolkit of torch's major version ({toolkit})")
    return missing


def find_sanitizer(toolkit: Toolkit | str) -> str | None:
    """compute-sanitizer, on the PATH or beside the toolkit's compiler."""
    beside = None if isinstance(toolkit, str) else shutil.which("compute-sanitizer", path=str(toolkit.nvcc.parent))
    return shutil.which("compute-sanitizer") or beside


class Gap(NamedTuple):
    """What does not run here, and why."""

    what: str
    reason: str
    asked_for: bool  # so that without it the check is incomplete


def gaps(config: Config, sanitizer: str | None, num_gpus: int) -> list[Gap]:
    """What the commands of :func:`steps` and the measurements leave out."""
    result = []
    for what, chosen in (("build", config.build), ("tests", config.tests), ("times", config.rounds > 0)):
        if not chosen:
            result.append(Gap(what, "left out by an option", False))
    if not config.sanitizer:
        result.append(Gap("compute-sanitizer", "left out by an option", False))
    elif sanitizer is None:
        reason = "neither on the PATH nor in the CUDA toolkit; --no-sanitizer does without"
        result.append(Gap("compute-sanitizer", reason, True))
    if config.tests and num_gpus < 2:
        result.append(Gap("tests of a second device", "this machine has one GPU", False))
    return result


def run(command: list[str], **variables: str) -> tuple[int, str]:
    """Exit status of a command, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def told_by(*command: str) -> str | None:
    """The first line that a command prints; None where there is no such command, or it fails."""
    try:
        status, output = run(list(command))
    except FileNotFoundError:
        return None
    return (output.splitlines() or [None])[0] if status == 0 else None


def versions() -> dict[str, Any]:
    """Of the GPU's driver, of ``ait`` and what it runs on; the commit ends in ``+`` where files were changed since."""
    return {
        "driver": told_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "ait": runpy.run_path(str(ROOT / "ait" / "_version.py"))["__version__"],  # not imported before it is built
        "commit": told_by("git", "describe", "--always", "--exclude", "*", "--abbrev=40", "--dirty=+"),
    }


def judge(status: int, output: str, *, is_test: bool) -> Outcome:
    """A step passed if its status is 0 and, for tests, at least one of them ran and passed."""
    end = output[-4000:]
    if not is_test:
        return Outcome(status == 0, f"exit status {status}", end)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    summary = ", ".join(f"{number} {word}" for word, number in counts.items()) or "no test ran"
    return Outcome(status == 0 and counts.get("passed", 0) > 0, f"{summary}; exit status {status}", end)


def steps(config: Config, sanitizer: str | None) -> dict[str, tuple[list[str], dict[str, str]]]:
    """By name: the commands that build and test, and their environment variables."""
    python = sys.executable
    result: dict[str, tuple[list[str], dict[str, str]]] = {}
    strict = {"AIT_REQUIRE_KERNELS": "1"}
    pytest = [python, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    if config.build:
        result["build"] = [python, "setup.py", "build_ext", "--inplace"], {"AIT_CUDA": "1"}
    if config.tests:
        result["tests"] = [*pytest, "tests/gpu"], strict
        for operator in SELECTIONS:
            chosen = f"({SELECTIONS[operator]}) and {LEFT_OUT} and {STOPS_THE_DEVICE}"
            command = [*pytest, "-p", "tests.gpu.plugin", f"tests/ops/test_{operator}.py", "-k", chosen]
            result[f"tests of {operator}"] = command, strict
    if config.sanitizer and sanitizer is not None:
        # Small shapes, since it makes kernels some hundred times slower; torch's cache of memory would hide errors.
        small = {**strict, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "AIT_GPU_SMALL_SHAPES": "1"}
        for tool in SANITIZER_TOOLS:
            options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            result[tool] = [sanitizer, *options, *pytest, "tests/gpu", "-k", SANITIZER_TESTS], small
    return result


def row_of(
    workload: Workload, times: Mapping[str, list[float]], bandwidth: float, flops: Mapping[str, float]
) -> dict[str, Any]:
    """Medians, ratios round by round, and the fraction of the floor, from milliseconds by implementation."""
    floor = 1e3 * max(workload.bytes / bandwidth, *(n / flops[kind] for kind, n in workload.flops.items()), 0.0)
    ours = Spread.of(times["ait"])
    row: dict[str, Any] = {
        "ait_us": 1e3 * ours.median,
        "ait_us_quartiles": [1e3 * ours.low, 1e3 * ours.high],
        "floor_us": 1e3 * floor,
        "fraction_of_floor": floor / ours.median,
    }
    for label, values in times.items():
        if label == "ait":
            continue
        row[f"{label}_us"] = 1e3 * Spread.of(values).median
        row[f"ratio {label}"] = Spread.of([v / own for v, own in zip(values, times["ait"], strict=True)]).median
    return row


def line_of(name: str, row: Mapping[str, Any]) -> str:
    """A row of the table that is printed."""
    ratios = [f"{key.removeprefix('ratio ')} {value:.2f}x" for key, value in row.items() if key.startswith("ratio ")]
    reached = f"{row['ait_us']:9.1f} us  floor {row['floor_us']:8.1f} us  {row['fraction_of_floor']:4.0%} of it"
    return f"{name:<40} {reached}  {', '.join(ratios)}".rstrip()


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The design's targets beside what was measured; without a measurement: None."""
    result = []
    for target in TARGETS:
        value = rows.get(target.row, {}).get(target.quantity)
        met = None if value is None else (value >= target.limit if target.at_least else value <= target.limit)
        result.append({**target._asdict(), "measured": value, "met": met})
    return result


@contextmanager
def recorded(failures: dict[str, str], what: str) -> Iterator[None]:
    """An exception ends the block, and is kept by the name of what was tried."""
    try:
        yield
    except Exception as error:
        failures[what] = traceback.format_exc()
        print(f"{what}: FAILED ({error!r})", flush=True)


def timed(config: Config, workload: Workload, clock: Callable[..., float]) -> dict[str, list[float]]:
    """Milliseconds by implementation, by turns."""
    times: dict[str, list[float]] = {label: [] for label in workload.implementations}
    for function in workload.implementations.values():
        for _ in range(3):
            function()
    for _ in range(config.rounds):
        for label, function in workload.implementations.items():
            times[label].append(clock(function, workload.kernels))
    return times


def measure(config: Config, report: dict[str, Any], clock: Callable[..., float] = milliseconds) -> dict[str, str]:
    """Puts the device's rates, and rows by name, into the report as they come; returns what failed, with tracebacks."""
    bandwidth, flops = measured_rates()
    bandwidth, flops["bfloat16"] = config.bandwidth or bandwidth, config.flops or flops["bfloat16"]
    report["rates"] = {"bandwidth_bytes_per_second": bandwidth, "flops_per_second": flops}
    rows, failures = report.setdefault("times", {}), {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, workload in workloads(dtype).items():
            full_name = f"{name}, {str(dtype).removeprefix('torch.')}"
            with recorded(failures, full_name):
                row = row_of(workload, timed(config, workload, clock), bandwidth, flops)
                if workload.results_bytes is not None:
                    row["extra_bytes"] = peak_bytes(workload.implementations["ait"]) - workload.results_bytes
                rows[full_name] = row
                print(line_of(full_name, row), flush=True)
    return failures


def outcome_of_times(config: Config, report: dict[str, Any]) -> Outcome:
    """Measures, and whatever fails meanwhile leaves what was measured in the report."""
    failures: dict[str, str] = {}
    with recorded(failures, "times"):
        import ait  # only now: the build has replaced its libraries

        failures |= measure(config, report)
        report["kernels"] = (ait.show_config("dicts") or {})["kernels"]  # what ran, after the comparison at first use
    report["targets (H200)"] = verdicts(report.setdefault("times", {}))
    for verdict in report["targets (H200)"]:
        sign = ">=" if verdict["at_least"] else "<="
        print(f"target on an H200: {verdict['row']}: {verdict['quantity']} {sign} {verdict['limit']:g}: ", end="")
        print("not measured" if verdict["met"] is None else f"{verdict['measured']:.4g}")
    summary = f"{len(report['times'])} rows" + "".join(f"; {name} failed" for name in failures)
    return Outcome(not failures, summary, next(iter(failures.values()), "")[-4000:])


def write_report(path: Path, report: dict[str, Any], outcomes: Mapping[str, Outcome], not_run: Sequence[Gap]) -> str:
    """Writes the report with its result, which is returned: passed, failed or incomplete."""
    report["outcomes"] = {name: outcome._asdict() for name, outcome in outcomes.items()}
    report["not run"] = [gap._asdict() for gap in not_run]
    if not all(outcome.passed for outcome in outcomes.values()):
        report["result"] = "failed"
    else:
        report["result"] = "incomplete" if any(gap.asked_for for gap in not_run) else "passed"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report["result"]


def main(config: Config) -> None:
    missing = missing_requirements(config)
    if missing:
        raise SystemExit("gpu_check: this machine lacks\n" + "\n".join(f"  {what}" for what in missing))
    num_gpus = torch.cuda.device_count()
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    report |= {"gpus": num_gpus, **versions()}
    sanitizer = find_sanitizer(find_toolkit())
    not_run = gaps(config, sanitizer, num_gpus)
    outcomes: dict[str, Outcome] = {}

    def keep(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        print(f"{name}: {'passed' if outcome.passed else 'FAILED'} ({outcome.summary})", flush=True)

    for name, (command, variables) in steps(config, sanitizer).items():
        keep(name, judge(*run(command, **variables), is_test="pytest" in command))
        if name == "build" and not outcomes[name].passed:
            break
    if config.rounds and all(outcome.passed for outcome in outcomes.values()):
        # Replaced below, unless the process ends before.
        unfinished = Gap("times", "the process ended while they were measured", True)
        write_report(config.out, report, outcomes, [*not_run, unfinished])
        keep("times", outcome_of_times(config, report))
    result = write_report(config.out, report, outcomes, not_run)
    for gap in not_run:
        print(f"not run: {gap.what} ({gap.reason})")
    print(f"report: {config.out.resolve()}")
    incomplete = ", ".join(gap.what for gap in not_run if gap.asked_for)
    print(f"gpu_check: {result}" + (f": {incomplete} did not run" if result == "incomplete" else ""))
    if result != "passed":
        raise SystemExit(1 if result == "failed" else 2)


if __name__ == "__main__":
    main(tyro.cli(Config))
