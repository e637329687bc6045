"""Benchmarks the operators against plain PyTorch and against the limit of the processor.

    python experiments/bench/operators.py --help

Every figure is a ratio of times taken by turns in one process: median over the rounds, quartiles in brackets. ``P`` is
the time in which the processor's multiply-add units can do the one big product of the write, ``2*T*E*R`` operations; it
is measured in the same rounds by a loop that touches nothing but registers.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import baselines
import torch
import tyro
from timing import Rounds, Spread, by_turns

import ait
from ait._C import run_fma_peak
from ait.nn.writer import BottleneckWriter
from ait.ops import bottleneck_select, hopfield_retrieve


@dataclass
class Config:
    """What to measure."""

    sections: tuple[str, ...] = ("select", "write", "hopfield", "small", "blocks", "models", "long")
    """Which parts to run, of: select, write, hopfield, small, blocks, models, long."""
    rounds: int = 7
    """Rounds of each comparison."""
    threads: int | None = None
    """Threads; torch's default otherwise."""
    compile: bool = True
    """Also time the baselines under torch.compile."""
    tokens: int = 32768
    """T, tokens of the default shape."""
    out: Path | None = None
    """JSON file for all figures."""


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


@dataclass(frozen=True)
class Row:
    what: str
    ratio: Spread
    target: str = ""
    note: str = ""
    shape: str = ""


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
            memory.grad = tokens.grad = None
            self.writer.zero_grad()
            (candidate.square().sum() + loss).backward()
            return tokens.grad

        return run


def compiled(function: Callable[..., Any], config: Config) -> dict[str, Callable[..., Any]]:
    """The function as it is, and compiled if the configuration says so."""
    return {"eager": function} | ({"compiled": torch.compile(function, dynamic=False)} if config.compile else {})


def gflops(flops: float, seconds: float) -> str:
    return f"{flops / seconds / 1e9:.0f} GFLOP/s"


def section_select(config: Config) -> Iterator[Row]:
    shape = Shape(tokens=config.tokens)
    problem, flops = Problem(shape), shape.product_flops
    query = torch.randn(1, shape.num_heads * shape.num_slots, shape.dim)
    columns = query[0].T.contiguous()
    rounds = by_turns(
        {
            "P": lambda: run_fma_peak(flops),
            "select": lambda: bottleneck_select(query, problem.tokens, shape.k),
            "mm": lambda: torch.mm(problem.tokens, columns),
            "mm+topk": lambda: torch.mm(query[0], problem.tokens.T).topk(shape.k, sorted=False),
        },
        config.rounds,
    )
    speed = gflops(flops, rounds.time("select").median)
    yield Row("P / bottleneck_select", rounds.ratio("P", "select"), ">= 0.75", speed, str(shape))
    yield Row("P / mm, a bare torch.mm", rounds.ratio("P", "mm"), "", gflops(flops, rounds.time("mm").median))
    yield Row("mm + topk / bottleneck_select", rounds.ratio("mm+topk", "select"))
    yield from selection_alone(config, shape)
    half = problem.tokens.bfloat16()
    rounds = by_turns(
        {
            "float32": lambda: bottleneck_select(query, problem.tokens, shape.k),
            "bfloat16": lambda: bottleneck_select(query, half, shape.k, selection_dtype=torch.bfloat16),
        },
        config.rounds,
    )
    yield Row("select float32 / bfloat16 (selection_dtype)", rounds.ratio("float32", "bfloat16"), ">= 1.5")


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


def selection_alone(config: Config, shape: Shape) -> Iterator[Row]:
    """Selection without the product, on one thread."""
    rows, threads = 64, torch.get_num_threads()
    query = torch.ones(rows, 1, 1)
    torch.set_num_threads(1)
    for name, logits_TR in distributions(shape.tokens, rows).items():
        tokens, logits_RT = logits_TR.unsqueeze(-1), logits_TR.T.contiguous()
        rounds = by_turns(
            {
                "ours": lambda tokens=tokens: bottleneck_select(query, tokens, shape.k),
                "topk": lambda logits=logits_RT: logits.topk(shape.k, dim=-1, sorted=False),
            },
            config.rounds,
        )
        target = ">= 7" if name == "normal" else ">= 5"
        yield Row(f"selection alone, {name}: topk / ours", rounds.ratio("topk", "ours"), target, "one thread")
    torch.set_num_threads(threads)


def section_write(config: Config) -> Iterator[Row]:
    shape = Shape(tokens=config.tokens)
    problem = Problem(shape)
    writes = {"ours": baselines.ours_write}
    writes |= {f"batched {kind}": run for kind, run in compiled(baselines.batched_write, config).items()}
    writes["published"] = baselines.published_write
    functions = {"P": lambda: run_fma_peak(shape.product_flops), "ours forward": problem.forward(baselines.ours_write)}
    functions |= {name: problem.forward_and_backward(write) for name, write in writes.items()}
    rounds = by_turns(functions, config.rounds)
    yield Row("write, forward / P", rounds.ratio("ours forward", "P"), "<= 1.65", shape=str(shape))
    backward = [
        both - forward for both, forward in zip(rounds.seconds["ours"], rounds.seconds["ours forward"], strict=True)
    ]
    rounds = Rounds(rounds.seconds | {"ours backward": backward})
    yield Row("write, backward / P", rounds.ratio("ours backward", "P"), "<= 1.2", "forward + backward less forward")
    best = rounds.fastest(*[name for name in writes if name.startswith("batched")])
    yield Row("write, forward + backward: batched / ours", rounds.ratio(best, "ours"), ">= 5", best)
    yield Row("write, forward + backward: published / ours", rounds.ratio("published", "ours"), ">= 10", "eager")


def section_hopfield(config: Config) -> Iterator[Row]:
    tokens, dim, slots = config.tokens, 768, 32
    torch.manual_seed(0)
    state, patterns, grad = torch.randn(tokens, dim), torch.randn(slots, dim) / dim**0.5, torch.randn(tokens, dim)
    leaf_state, leaf_patterns = state.clone().requires_grad_(), patterns.clone().requires_grad_()

    def forward(retrieve: Callable[..., torch.Tensor], steps: int) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return retrieve(state, patterns, 1.0, steps)

        return run

    def both(retrieve: Callable[..., torch.Tensor], steps: int) -> Callable[[], object]:
        def run() -> object:
            leaf_state.grad = leaf_patterns.grad = None
            return retrieve(leaf_state, leaf_patterns, 1.0, steps).backward(grad)

        return run

    for steps in (1, 3, 10):
        retrievals: dict[str, Callable[..., torch.Tensor]] = {"ours": lambda *args: hopfield_retrieve(*args)[0]}
        for name, baseline in (("plain", baselines.plain_retrieve), ("Gram", baselines.gram_retrieve)):
            if steps > 1 or name == "plain":
                retrievals |= {f"{name} {kind}": run for kind, run in compiled(baseline, config).items()}
        functions = {name: forward(run, steps) for name, run in retrievals.items()}
        functions |= {f"{name} both": both(run, steps) for name, run in retrievals.items()}
        rounds = by_turns(functions, config.rounds)
        seconds = dict(rounds.seconds)
        for name in retrievals:
            pairs = zip(seconds[f"{name} both"], seconds[name], strict=True)
            seconds[f"{name} backward"] = [total - own for total, own in pairs]
        rounds, others = Rounds(seconds), [name for name in retrievals if name != "ours"]
        best = rounds.fastest(*others)
        shape = f"T={tokens} E={dim} M={slots}"
        yield Row(f"hopfield, {steps} steps, forward: PyTorch / ours", rounds.ratio(best, "ours"), ">= 2", best, shape)
        best = rounds.fastest(*[f"{name} backward" for name in others])
        ratio = rounds.ratio(best, "ours backward")
        yield Row(f"hopfield, {steps} steps, backward: PyTorch / ours", ratio, ">= 1.5", best)


def section_small(config: Config) -> Iterator[Row]:
    for tokens, dim, k in ((256, 64, 64), (256, 128, 64), (1024, 128, 64), (4096, 192, 64), (8192, 128, 128)):
        shape = Shape(tokens=tokens, dim=dim, k=k)
        problem = Problem(shape)
        writes = {"ours": baselines.ours_write}
        writes |= {f"batched {kind}": run for kind, run in compiled(baselines.batched_write, config).items()}
        functions = {name: problem.forward_and_backward(write) for name, write in writes.items()}
        rounds = by_turns(functions, 5 * config.rounds, warm_up=3)
        best = rounds.fastest(*[name for name in writes if name != "ours"])
        what = "small write, forward + backward: batched / ours"
        yield Row(what, rounds.ratio(best, "ours"), ">= 1", best, str(shape))


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


def section_blocks(config: Config) -> Iterator[Row]:
    for dim, images, target in ((768, 32, "<= 1.05"), (192, 128, "<= 1.2")):
        torch.manual_seed(0)
        # One block at patch 4 on 32 x 32 images: 64 tokens an image. Patch embedding and head are the same in both.
        blocks = {name: ait.create_model(f"{name}_base", embed_dim=dim, depth=1) for name in ("ait", "vit")}
        inputs = torch.randn(images, 3, 32, 32)
        rounds = by_turns({name: training_step(block, inputs) for name, block in blocks.items()}, config.rounds)
        shape = f"E={dim} T={images * 64}"
        yield Row("training step of one block: AiT / ViT", rounds.ratio("ait", "vit"), target, shape=shape)


def section_models(config: Config) -> Iterator[Row]:
    for name, size, patch, channels in (("digits", 8, 2, 1), ("Triangle", 64, 32, 3)):
        torch.manual_seed(0)
        options = dict(img_size=size, patch_size=patch, in_chans=channels, num_classes=10)
        models = {kind: ait.create_model(f"{kind}_tiny", **options) for kind in ("ait", "vit")}
        inputs = torch.randn(64, channels, size, size)
        steps = {kind: training_step(model, inputs) for kind, model in models.items()}
        rounds = by_turns(steps, 5 * config.rounds, warm_up=3)
        what = f"training step, {name}: ait_tiny / vit_tiny"
        milliseconds = f"{rounds.time('ait').median * 1e3:.1f} ms"
        yield Row(what, rounds.ratio("ait", "vit"), "<= 1.6", milliseconds, "64 images")


def section_long(config: Config) -> Iterator[Row]:
    torch.manual_seed(0)
    dim, rows, long = 64, 256, 1 << 20
    query, tokens = torch.randn(1, rows, dim), torch.randn(long, dim)
    rounds = by_turns(
        {
            "long": lambda: bottleneck_select(query, tokens, 512),
            "an eighth": lambda: bottleneck_select(query, tokens[: long // 8], 512),
        },
        config.rounds,
    )
    ratio = rounds.ratio("long", "an eighth")
    per_token = Spread(ratio.median / 8, ratio.low / 8, ratio.high / 8)
    shape = f"T={long} E={dim} R={rows}"
    yield Row("time a token at T = 1,048,576 / at 131,072", per_token, "within 0.15 of 1", shape=shape)


SECTIONS: dict[str, Callable[[Config], Iterator[Row]]] = {
    "select": section_select,
    "write": section_write,
    "hopfield": section_hopfield,
    "small": section_small,
    "blocks": section_blocks,
    "models": section_models,
    "long": section_long,
}


def machine() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": name, "threads": torch.get_num_threads(), **(ait.show_config("dicts") or {})}


def main(config: Config) -> None:
    unknown = set(config.sections) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"operators.py: unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, kernels: {about['instruction set']}")
    print(f"ait {about['ait']}, torch {about['torch']['running']}, float32 unless said otherwise")
    print(f"\n{'what':<58}{'median (quartiles)':<28}{'target':<18}note")
    rows = []
    for section in config.sections:
        for row in SECTIONS[section](config):
            note = ", ".join(part for part in (row.note, row.shape) if part)
            print(f"{row.what:<58}{row.ratio!s:<28}{row.target:<18}{note}", flush=True)
            rows.append({"section": section, **asdict(row)})
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
