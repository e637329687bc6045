"""The comparisons of the benchmark, section by section: each yields the rows of its part of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import torch
import torch._functorch.config
from limits import fresh_pages, read_all, retrieval_flops
from peak_memory import in_own_process, select_extra_bytes, write_extra_bytes
from table import Limit, Row, Target, gflops, gigabytes
from timing import LARGE_RESULTS, Spread, by_turns
from workloads import Problem, Shape, distributions, training_step

import ait
from ait._C import run_fma_peak
from ait.ops import bottleneck_select, hopfield_retrieve


@dataclass
class Config:
    """What to measure."""

    sections: tuple[str, ...] = ("select", "write", "hopfield", "small", "blocks", "models", "memory", "long")
    """Which parts to run, of: select, write, hopfield, small, blocks, models, memory, long."""
    rounds: int = 7
    """Rounds of each comparison."""
    threads: int | None = None
    """Threads; torch's default otherwise."""
    compile: bool = True
    """Also time the baselines under torch.compile."""
    tokens: int = 32768
    """T, tokens of the default shape."""
    out: Path | None = None
    """JSON file for all figures; the table goes beside it, as Markdown."""


Write = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def compiled(name: str, function: Callable[..., Any], config: Config) -> dict[str, Callable[..., Any]]:
    """The function as it is, and compiled if the configuration says so."""
    variants = {f"{name} eager": function}
    return variants | ({f"{name} compiled": torch.compile(function, dynamic=False)} if config.compile else {})


def select(config: Config) -> Iterator[Row]:
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
    speeds = {name: gflops(flops, rounds.time(name).median) for name in ("P", "select", "mm")}
    limits = {name: Limit(f"P, {speeds['P']}", rounds.ratio("P", name)) for name in ("select", "mm")}
    target = Target(">=", 0.75, 0.88)
    share = rounds.ratio("P", "select")
    yield Row("P / bottleneck_select", share, target, speeds["select"], limits["select"], shape=str(shape))
    yield Row("P / mm, a bare torch.mm", rounds.ratio("P", "mm"), None, speeds["mm"], limits["mm"])
    yield Row("mm + topk / bottleneck_select", rounds.ratio("mm+topk", "select"))
    yield from _selection_alone(config, shape)
    half = problem.tokens.bfloat16()
    rounds = by_turns(
        {
            "float32": lambda: bottleneck_select(query, problem.tokens, shape.k),
            "bfloat16": lambda: bottleneck_select(query, half, shape.k, selection_dtype=torch.bfloat16),
        },
        config.rounds,
    )
    speed = gflops(flops, rounds.time("bfloat16").median)
    what = "select, float32 / bfloat16 (selection_dtype)"
    yield Row(what, rounds.ratio("float32", "bfloat16"), Target(">=", 1.5, 2), speed)


def _selection_alone(config: Config, shape: Shape) -> Iterator[Row]:
    """Selection without the product, on one thread.

    Either always follows a topk, which leaves neither logits nor code in the cache: A B A B. The limit is reading the
    logits once, under the same condition.
    """
    rows, threads = 64, torch.get_num_threads()
    query = torch.ones(rows, 1, 1)
    torch.set_num_threads(1)
    for name, logits_TR in distributions(shape.tokens, rows).items():
        tokens, logits_RT, to_read = logits_TR.unsqueeze(-1), logits_TR.T.contiguous(), logits_TR.clone()
        topk = partial(logits_RT.topk, shape.k, dim=-1, sorted=False)
        ours = partial(bottleneck_select, query, tokens, shape.k)
        functions = {"topk": topk, "ours": ours, "cached": ours, "topk again": topk, "read": partial(read_all, to_read)}
        rounds = by_turns(functions, 2 * config.rounds, warm_up=2, alternating=False)
        yield Row(
            f"selection alone, {name}: topk / ours",
            rounds.ratio("topk", "ours"),
            Target(">=", 7 if name == "normal" else 5, 10),
            gigabytes(logits_RT.nbytes, rounds.time("ours").median),
            Limit(f"reading, {gigabytes(logits_RT.nbytes, rounds.time('read').median)}", rounds.ratio("read", "ours")),
            f"one thread; logits in the cache: {rounds.ratio('topk', 'cached').median:.3g}",
        )
    torch.set_num_threads(threads)


def write(config: Config) -> Iterator[Row]:
    shape = Shape(tokens=config.tokens)
    problem, flops = Problem(shape), shape.product_flops
    writes: dict[str, Write] = {"ours": baselines.ours_write}
    writes |= compiled("batched", baselines.batched_write, config)
    writes |= compiled("published", baselines.published_write, config)
    functions = {"P": lambda: run_fma_peak(flops), "ours forward": problem.forward(baselines.ours_write)}
    functions |= {name: problem.forward_and_backward(write) for name, write in writes.items()}
    rounds = by_turns(functions, config.rounds, touched_bytes=LARGE_RESULTS)
    speed = gflops(flops, rounds.time("ours forward").median)
    target = Target("<=", 1.65, 1.35)
    limit = Limit("P", rounds.ratio("P", "ours forward"))
    yield Row("write, forward / P", rounds.ratio("ours forward", "P"), target, speed, limit, shape=str(shape))
    rounds = rounds.with_difference("ours backward", "ours", "ours forward")
    note = "forward + backward less forward"
    yield Row("write, backward / P", rounds.ratio("ours backward", "P"), Target("<=", 1.2, 0.8), note=note)
    for baseline, target in (("batched", Target(">=", 5, 7)), ("published", Target(">=", 10, 14))):
        best = rounds.fastest(*[name for name in writes if name.startswith(baseline)])
        what = f"write, forward + backward: {baseline} / ours"
        milliseconds = f"{rounds.time('ours').median * 1e3:.0f} ms"
        yield Row(what, rounds.ratio(best, "ours"), target, milliseconds, note=best)


def hopfield(config: Config) -> Iterator[Row]:
    tokens, dim, slots = config.tokens, 768, 32
    torch.manual_seed(0)
    state, patterns, grad = torch.randn(tokens, dim), torch.randn(slots, dim) / dim**0.5, torch.randn(tokens, dim)
    leaf_state, leaf_patterns = state.clone().requires_grad_(), patterns.clone().requires_grad_()
    # In: the state, and for the backward its gradient, too. Out: as large as the state.
    traffic = {"": 2 * state.nbytes, " backward": 3 * state.nbytes}
    gates = {"": Target(">=", 2, 3), " backward": Target(">=", 1.5, 2)}

    def forward(retrieve: Callable[..., torch.Tensor], steps: int) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return retrieve(state, patterns, 1.0, steps)

        return run

    def backward(retrieve: Callable[..., torch.Tensor], steps: int) -> Callable[[], object]:
        out = retrieve(leaf_state, leaf_patterns, 1.0, steps)

        def run() -> object:
            return torch.autograd.grad(out, [leaf_state, leaf_patterns], grad, retain_graph=True)

        return run

    for steps in (1, 3, 10):
        retrievals: dict[str, Callable[..., torch.Tensor]] = {"ours": lambda *args: hopfield_retrieve(*args)[0]}
        retrievals |= compiled("plain", baselines.plain_retrieve, config)
        if steps > 1:
            retrievals |= compiled("Gram", baselines.gram_retrieve, config)
        functions = {name: forward(run, steps) for name, run in retrievals.items()}
        # A graph that is walked again and again must keep its buffers.
        with torch._functorch.config.patch(donated_buffer=False):
            functions |= {f"{name} backward": backward(run, steps) for name, run in retrievals.items()}
            for way in traffic:
                flops = retrieval_flops(tokens, dim, slots, steps, backward=way != "")
                functions[f"products{way}"] = partial(run_fma_peak, flops)
            functions["pages"] = partial(fresh_pages, state.nbytes)
            rounds = by_turns(functions, config.rounds, touched_bytes=LARGE_RESULTS)
        others = [name for name in retrievals if name != "ours"]
        for way, target in gates.items():
            best, own = rounds.fastest(*[name + way for name in others]), f"ours{way}"
            rounds = rounds.with_sum(f"limit{way}", f"products{way}", "pages")
            flops = retrieval_flops(tokens, dim, slots, steps, backward=way != "")
            seconds = rounds.time(own).median
            yield Row(
                f"hopfield, {steps} steps, {way.strip() or 'forward'}: PyTorch / ours",
                rounds.ratio(best, own),
                target,
                f"{gflops(flops, seconds)}, {gigabytes(traffic[way], seconds)}",
                Limit("products and fresh pages", rounds.ratio(f"limit{way}", own)),
                f"{best.removesuffix(way)}; at the limit {rounds.ratio(best, f'limit{way}').median:.3g}",
                f"T={tokens} E={dim} M={slots}",
            )


def small(config: Config) -> Iterator[Row]:
    for tokens, dim, k in ((256, 64, 64), (256, 128, 64), (1024, 128, 64), (4096, 192, 64), (8192, 128, 128)):
        shape = Shape(tokens=tokens, dim=dim, k=k)
        problem = Problem(shape)
        writes: dict[str, Write] = compiled("ours", baselines.ours_write, config)
        others = compiled("batched", baselines.batched_write, config)
        functions = {name: problem.forward_and_backward(write) for name, write in (writes | others).items()}
        rounds = by_turns(functions, 5 * config.rounds, warm_up=3)
        note = best = rounds.fastest(*others)
        if "ours compiled" in writes:
            note += f"; ours compiled, too: {rounds.ratio(best, 'ours compiled').median:.3g}"
        what, ours = "small write, both ways: batched / ours", rounds.time("ours eager").median
        milliseconds = f"{ours * 1e3:.2f} ms"
        yield Row(what, rounds.ratio(best, "ours eager"), Target(">=", 1, 2), milliseconds, note=note, shape=str(shape))


def blocks(config: Config) -> Iterator[Row]:
    for dim, images, gate in ((768, 32, 1.05), (192, 128, 1.2)):
        torch.manual_seed(0)
        # One block at patch 4 on 32 x 32 images: 64 tokens an image. Patch embedding and head are the same in both.
        models = {name: ait.create_model(f"{name}_base", embed_dim=dim, depth=1) for name in ("ait", "vit")}
        inputs = torch.randn(images, 3, 32, 32)
        rounds = by_turns({name: training_step(model, inputs) for name, model in models.items()}, 3 * config.rounds)
        what, milliseconds = "training step of one block: AiT / ViT", f"{rounds.time('ait').median * 1e3:.0f} ms"
        yield Row(what, rounds.ratio("ait", "vit"), Target("<=", gate), milliseconds, shape=f"E={dim} T={images * 64}")


def models(config: Config) -> Iterator[Row]:
    for name, size, patch, channels in (("digits", 8, 2, 1), ("Triangle", 64, 32, 3)):
        torch.manual_seed(0)
        options = dict(img_size=size, patch_size=patch, in_chans=channels, num_classes=10)
        pair = {kind: ait.create_model(f"{kind}_tiny", **options) for kind in ("ait", "vit")}
        inputs = torch.randn(64, channels, size, size)
        steps = {kind: training_step(model, inputs) for kind, model in pair.items()}
        rounds = by_turns(steps, 5 * config.rounds, warm_up=3)
        what = f"training step, {name}: ait_tiny / vit_tiny"
        milliseconds = f"{rounds.time('ait').median * 1e3:.1f} ms"
        yield Row(what, rounds.ratio("ait", "vit"), Target("<=", 1.6, 1.25), milliseconds, shape="64 images")


def memory(config: Config) -> Iterator[Row]:
    """Megabytes at the peak beyond inputs, outputs and the gradient of the tokens."""
    shape = Shape(tokens=config.tokens)
    extra = in_own_process(write_extra_bytes, shape, torch.get_num_threads())
    yield from _megabytes("write, both ways", extra, Target("<=", 40), str(shape))
    shape = Shape(tokens=1 << 20, dim=64)
    extra = in_own_process(select_extra_bytes, shape, torch.get_num_threads())
    yield from _megabytes("bottleneck_select", extra, Target("<=", 64), "T=1048576 E=64 R=256 k=512")


def _megabytes(what: str, extra: int | None, target: Target, shape: str) -> Iterator[Row]:
    if extra is not None:
        yield Row(f"extra memory, {what} (MB)", Spread.of([extra / 1e6]), target, shape=shape)


def long(config: Config) -> Iterator[Row]:
    torch.manual_seed(0)
    dim, rows, tokens = 64, 256, 1 << 20
    query, pool = torch.randn(1, rows, dim), torch.randn(tokens, dim)
    rounds = by_turns(
        {
            "long": lambda: bottleneck_select(query, pool, 512),
            "an eighth": lambda: bottleneck_select(query, pool[: tokens // 8], 512),
        },
        config.rounds,
    )
    ratio = rounds.ratio("long", "an eighth")
    per_token = Spread(ratio.median / 8, ratio.low / 8, ratio.high / 8)
    speed = gflops(2.0 * tokens * rows * dim, rounds.time("long").median)
    shape = f"T={tokens} E={dim} R={rows}"
    yield Row("time a token, T = 1,048,576 / 131,072", per_token, Target("<=", 1.15), speed, shape=shape)


SECTIONS: dict[str, Callable[[Config], Iterator[Row]]] = {
    "select": select,
    "write": write,
    "hopfield": hopfield,
    "small": small,
    "blocks": blocks,
    "models": models,
    "memory": memory,
    "long": long,
}
