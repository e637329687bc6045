"""What ``gpu_check.py`` times on a GPU: the operators at the default shape beside plain PyTorch, and their floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

Implementation = Callable[[], object]
TOKENS, WIDTH, ROWS, CAPACITY, SLOTS = 32768, 768, 256, 512, 32


@dataclass(frozen=True)
class Workload:
    """Implementations by name, ``"ait"`` among them, and what they cannot do without."""

    bytes: float  # each input read once, each output written once
    implementations: dict[str, Implementation]
    flops: dict[str, float] = field(default_factory=dict)  # by the dtype whose rate counts
    results_bytes: float | None = None  # held after the call: where extra memory is measured


def milliseconds(function: Implementation) -> float:
    """Time of one call on the GPU, caches of the device cold as in training."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_bytes(function: Implementation) -> float:
    """Most memory of the device during a call beyond what there was before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def measured_rates() -> tuple[float, dict[str, float]]:
    """Bytes a second of a copy, and operations a second of large products by dtype."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(10)]
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        product = [milliseconds(lambda x=x: x @ x) for _ in range(5)]
        rates[str(dtype).removeprefix("torch.")] = 2 * 8192.0**3 / (median(product) * 1e-3)
    return 2 * source.numel() * 4 / (median(times) * 1e-3), rates


def topk(query: Tensor, x: Tensor) -> Tensor:
    return torch.topk(query @ x.float().T, CAPACITY).indices


def published_write(query: Tensor, x: Tensor) -> Tensor:
    # As the released code goes about it: all logits, a mask of the kept ones, a dense softmax.
    logits = query @ x.float().T
    kept = torch.zeros_like(logits).scatter_(1, torch.topk(logits, CAPACITY).indices, 1.0)
    return torch.softmax(logits.masked_fill(kept == 0, float("-inf")), dim=-1) @ x.float()


def gathered_write(query: Tensor, x: Tensor) -> Tensor:
    # The best that plain PyTorch offers: the kept tokens alone.
    values, indices = torch.topk(query @ x.float().T, CAPACITY)
    return torch.einsum("rk,rke->re", torch.softmax(values, dim=-1), x[indices].float())


def our_write(query: Tensor, x: Tensor) -> Tensor:
    import ait

    chosen = ait.ops.bottleneck_select(query[None], x, CAPACITY)[1][0]
    return ait.ops.bottleneck_attend(query, x, chosen)[0]


def read(x: Tensor, patterns: Tensor) -> Tensor:
    return (torch.softmax(x.float() @ patterns.T, dim=-1) @ patterns).to(x.dtype)


def our_read(x: Tensor, patterns: Tensor) -> Tensor:
    import ait

    return ait.ops.hopfield_retrieve(x, patterns)[0]


def trained(function: Callable[..., Tensor], *inputs: Tensor) -> Implementation:
    """Forward and backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(function(*leaves).float().sum(), leaves)


def backward_of(function: Callable[..., Tensor], *inputs: Tensor) -> Implementation:
    """The backward alone, of a graph that is kept."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = function(*leaves).float().sum()
    return lambda: torch.autograd.grad(loss, leaves, retain_graph=True)


def workloads(dtype: torch.dtype) -> dict[str, Workload]:
    """By name; ratios are formed with plain PyTorch, eager and compiled, and with the published code's way."""
    import ait
    from ait.ops import reference

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x, query, patterns = normal(TOKENS, WIDTH).to(dtype), normal(ROWS, WIDTH) / WIDTH**0.5, normal(SLOTS, WIDTH)
    indices = ait.ops.bottleneck_select(query[None], x, CAPACITY)[1][0]
    size = float(x.numel() * x.element_size())
    logits = normal(TOKENS, ROWS)
    ones = torch.ones(ROWS, 1, 1, device="cuda")
    # Tensor cores need three terms of a float32 query for float32's accuracy.
    product = 2.0 * TOKENS * ROWS * WIDTH
    write_flops = {"bfloat16": 3 * product} if dtype == torch.bfloat16 else {"float32": product}
    read_product = 2.0 * TOKENS * SLOTS * WIDTH
    compiled_topk, compiled_read, compiled_write = map(torch.compile, (topk, read, gathered_write))
    others = {"eager": gathered_write, "compiled": compiled_write, "published loop": published_write}
    reads = {"ait": our_read, "eager": read, "compiled": compiled_read}

    result = {
        "select": Workload(
            size,
            {
                "ait": lambda: ait.ops.bottleneck_select(query[None], x, CAPACITY),
                "eager": lambda: topk(query, x),
                "compiled": lambda: compiled_topk(query, x),
            },
            write_flops,
        ),
        "attend": Workload(
            size,
            {
                "ait": lambda: ait.ops.bottleneck_attend(query, x, indices),
                "eager": lambda: reference.bottleneck_attend(query, x, indices),
            },
        ),
        "write": Workload(
            size,
            {"ait": lambda: our_write(query, x), **{n: lambda f=f: f(query, x) for n, f in others.items()}},
            write_flops,
        ),
        "write, backward": Workload(
            2 * size, {n: backward_of(f, query, x) for n, f in {"ait": our_write, **others}.items()}
        ),
        "write, forward and backward": Workload(
            3 * size,
            {n: trained(f, query, x) for n, f in {"ait": our_write, **others}.items()},
            write_flops,
            results_bytes=size,
        ),
        "read": Workload(
            2 * size, {n: lambda f=f: f(x, patterns) for n, f in reads.items()}, {"float32": 2 * read_product}
        ),
        "read, forward and backward": Workload(
            5 * size, {n: trained(f, x, patterns) for n, f in reads.items()}, {"float32": 7 * read_product}
        ),
    }
    if dtype == torch.float32:
        result["selection of ready logits"] = Workload(
            4.0 * TOKENS * ROWS,
            {
                "ait": lambda: ait.ops.bottleneck_select(ones, logits.unsqueeze(-1), CAPACITY),
                "eager": lambda: torch.topk(logits, CAPACITY, dim=0),
            },
        )
    return result
