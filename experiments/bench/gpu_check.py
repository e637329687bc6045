"""Builds the CUDA kernels, tests them on this machine's GPU, measures them, and writes a report.

    make gpu-check                                  # or: python experiments/bench/gpu_check.py --help

The report (JSON) holds versions, the outcome of the tests and of compute-sanitizer, and medians of the times of the
operators at the default shape, with ratios to plain PyTorch, torch.compile and the floor of the memory's bandwidth.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_TESTS = "float32 or bfloat16 or special or graph"


@dataclass
class Config:
    """What to run."""

    build: bool = True
    """Build the kernels first, for this machine's GPU."""
    tests: bool = True
    """Run tests/gpu."""
    sanitizer: bool = True
    """Run a few of them under compute-sanitizer, where it is installed."""
    rounds: int = 20
    """Rounds of each comparison; 0 measures nothing."""
    bandwidth: float | None = None
    """Bandwidth of the GPU's memory in bytes a second; measured by copying where it is not given."""
    out: Path = Path("gpu_check.json")
    """Report file."""


def run(command: list[str], **variables: str) -> tuple[bool, str]:
    """Whether a command succeeded, and the end of what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def milliseconds(function: Callable[[], object]) -> float:
    """Time of one call on the GPU, caches of the device cold as in training."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measured_bandwidth() -> float:
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.numel() * 4 / (median(times) * 1e-3)


def workloads(dtype: torch.dtype) -> dict[str, tuple[float, dict[str, Callable[[], object]]]]:
    """By name: bytes that have to pass through memory, and implementations; the first one is ours."""
    import ait
    from ait.ops import reference

    tokens_T, width, rows, k, slots = 32768, 768, 256, 512, 32
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x, query, patterns = normal(tokens_T, width).to(dtype), normal(rows, width) / width**0.5, normal(slots, width)
    _, indices = ait.ops.bottleneck_select(query[None], x, k)
    indices = indices[0]
    size = float(x.numel() * x.element_size())

    def topk(query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.topk(query @ x.float().T, k).indices

    def softmax_over(query: torch.Tensor, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return reference.bottleneck_attend(query, x, indices)[0]

    def read(x: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(x.float() @ patterns.T, dim=-1) @ patterns).to(x.dtype)

    def published_write(query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # As the released code goes about it: all logits, a mask of the kept ones, a dense softmax.
        logits = query @ x.float().T
        kept = torch.zeros_like(logits).scatter_(1, torch.topk(logits, k).indices, 1.0)
        return torch.softmax(logits.masked_fill(kept == 0, float("-inf")), dim=-1) @ x.float()

    def our_write(query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        chosen = ait.ops.bottleneck_select(query[None], x, k)[1][0]
        return ait.ops.bottleneck_attend(query, x, chosen)[0]

    def train(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
        wanted = [t for t in leaves if t.requires_grad]
        return lambda: torch.autograd.grad(function(*leaves).float().sum(), wanted)

    compiled_topk, compiled_read = torch.compile(topk), torch.compile(read)
    compiled_write = torch.compile(published_write)

    def retrieve(x: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        return ait.ops.hopfield_retrieve(x, patterns)[0]

    return {
        "select": (
            size,
            {
                "ait": lambda: ait.ops.bottleneck_select(query[None], x, k),
                "eager": lambda: topk(query, x),
                "compiled": lambda: compiled_topk(query, x),
            },
        ),
        "write": (
            size,
            {
                "ait": lambda: our_write(query, x),
                "published loop": lambda: published_write(query, x),
                "compiled": lambda: compiled_write(query, x),
            },
        ),
        "write, forward and backward": (
            2 * size,
            {
                "ait": train(our_write, query, x),
                "published loop": train(published_write, query, x),
                "compiled": train(compiled_write, query, x),
            },
        ),
        "attend": (
            size,
            {
                "ait": lambda: ait.ops.bottleneck_attend(query, x, indices),
                "eager": lambda: softmax_over(query, x, indices),
            },
        ),
        "read": (
            2 * size,
            {
                "ait": lambda: retrieve(x, patterns),
                "eager": lambda: read(x, patterns),
                "compiled": lambda: compiled_read(x, patterns),
            },
        ),
        "read, forward and backward": (
            5 * size,
            {
                "ait": train(retrieve, x, patterns),
                "eager": train(read, x, patterns),
                "compiled": train(compiled_read, x, patterns),
            },
        ),
    }


def measure(config: Config) -> dict[str, Any]:
    """Medians, by turns in one process, with the fraction of the floor that was reached."""
    bandwidth = config.bandwidth or measured_bandwidth()
    result: dict[str, Any] = {"bandwidth_bytes_per_second": bandwidth}
    for dtype in (torch.bfloat16, torch.float32):
        for name, (size, implementations) in workloads(dtype).items():
            for function in implementations.values():
                for _ in range(3):
                    function()
            times: dict[str, list[float]] = {label: [] for label in implementations}
            for _ in range(config.rounds):
                for label, function in implementations.items():
                    times[label].append(milliseconds(function))
            medians = {label: median(values) for label, values in times.items()}
            floor = size / bandwidth * 1e3
            row = {"floor_ms": floor, "fraction_of_floor": floor / medians["ait"], "median_ms": medians}
            row["ratio_to_ait"] = {label: time / medians["ait"] for label, time in medians.items()}
            result[f"{name}, {str(dtype).removeprefix('torch.')}"] = row
            ratios = ", ".join(f"{label} {ratio:.2f}x" for label, ratio in row["ratio_to_ait"].items())
            reached = f"{1e3 * medians['ait']:8.1f} us, {row['fraction_of_floor']:.0%} of floor"
            print(f"{name:<30} {dtype!s:<15} {reached}; {ratios}")
    return result


def main(config: Config) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch sees no CUDA device (torch.cuda.is_available() is False)")
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    report |= {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    outcomes: dict[str, bool] = {}
    report["outcomes"] = outcomes

    def step(name: str, command: list[str], **variables: str) -> None:
        outcomes[name], report[f"{name}: output"] = run(command, **variables)
        print(f"{name}: {'passed' if outcomes[name] else 'FAILED'}")

    if config.build:
        step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], AIT_CUDA="1")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/gpu"]
    if config.tests:
        step("tests", tests, AIT_REQUIRE_KERNELS="1")
    sanitizer = shutil.which("compute-sanitizer")
    if config.sanitizer and sanitizer is not None:
        for tool in SANITIZER_TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests, "-k", SANITIZER_TESTS]
            # Small shapes, since it makes kernels some hundred times slower; torch's cache of memory would hide errors.
            step(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", AIT_GPU_SMALL_SHAPES="1")
    elif config.sanitizer:
        report["compute-sanitizer"] = "not installed"
    if config.rounds and all(outcomes.values()):
        report["times"] = measure(config)
    config.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"report: {config.out.resolve()}")
    if not all(outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
