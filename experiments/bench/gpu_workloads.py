"""What ``gpu_check.py`` times on a GPU: the operators at the default shape beside plain PyTorch, and their floors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Implementation = Callable[[], object]
TOKENS, WIDTH, ROWS, CAPACITY, SLOTS = 32768, 768, 256, 512, 32
# For which the device sleeps before a call is timed: about 1 ms, and about 1 s.
SLEEP_CYCLES, MOST_SLEEP_CYCLES = 2_000_000, 2_000_000_000


class Kernels(NamedTuple):
    """Kernels of a call: a word that their names hold, and how many of them one call launches."""

    name: str
    launches: int


# At the default shape with float32 tokens: one for each chunk.
SELECTION_KERNELS = Kernels("select_chunk", 2)


@dataclass(frozen=True)
class Workload:
    """Implementations by name, ``"ait"`` among them, and what they cannot do without."""

    bytes: float  # each input read once, each output written once
    implementations: dict[str, Implementation]
    flops: dict[str, float] = field(default_factory=dict)  # by the dtype whose rate counts
    results_bytes: float | None = None  # held after the call: where extra memory is measured
    kernels: Kernels | None = None  # that alone are timed


def flush_caches() -> None:
    """Leaves nothing of what a call reads in the device's caches, as in training."""
    torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()


def milliseconds(function: Implementation, kernels: Kernels | None = None) -> float:
    """Time of one call on the device, from its first kernel to its last, the gaps between them included.

    The device sleeps until the host has issued the whole call: what the host takes for it is no part of the time.

    Args:
        function: the call.
        kernels: if given, the time is the sum over these kernels alone.

    Raises:
        RuntimeError: the call waits for the device; or a profile does not show ``kernels``.
    """
    if kernels is not None:
        flush_caches()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        return milliseconds_of_kernels(profiler.events(), kernels)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = SLEEP_CYCLES
    while cycles <= MOST_SLEEP_CYCLES:
        flush_caches()
        torch.cuda._sleep(cycles)
        start.record()
        function()
        end.record()
        is_issued_in_time = not start.query()  # else the device may have waited for the host
        torch.cuda.synchronize()
        if is_issued_in_time:
            return start.elapsed_time(end)
        cycles *= 2
    raise RuntimeError(f"gpu_check: a call was not issued while the device slept for {cycles // 2} cycles")


def milliseconds_of_kernels(events: Iterable[Any], kernels: Kernels) -> float:
    """Sum of what ``kernels`` took, from the events of a profile of one call.

    Raises:
        RuntimeError: there are more or fewer of them.
    """
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    times = [event.time_range.elapsed_us() for event in on_device if kernels.name in event.name]
    if len(times) != kernels.launches:
        names = ", ".join(event.name for event in on_device) or "nothing"
        raise RuntimeError(f"gpu_check: expected {kernels.launches} kernels {kernels.name} in a profile, got {names}")
    return 1e-3 * sum(times)


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


def workloads(dtype: torch.dtype, device: str = "cuda") -> dict[str, Workload]:
    """By name; ratios are formed with plain PyTorch, eager and compiled, and with the published code's way.

    The rows of random queries list tokens that are spread evenly. Of equal rows each lists the same tokens: slots that
    agree, which is where the gradient of the tokens has the longest sums.
    """
    import ait
    from ait.ops import reference

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, query, patterns = normal(TOKENS, WIDTH).to(dtype), normal(ROWS, WIDTH) / WIDTH**0.5, normal(SLOTS, WIDTH)
    indices = ait.ops.bottleneck_select(query[None], x, CAPACITY)[1][0]
    size = float(x.numel() * x.element_size())
    equal_rows = query[:1].repeat(ROWS, 1)
    # Tensor cores need three terms of a float32 query for float32's accuracy.
    product = 2.0 * TOKENS * ROWS * WIDTH
    write_flops = {"bfloat16": 3 * product} if dtype == torch.bfloat16 else {"float32": product}
    read_product = 2.0 * TOKENS * SLOTS * WIDTH
    compiled_topk, compiled_read, compiled_write = map(torch.compile, (topk, read, gathered_write))
    writes = {"ait": our_write, "eager": gathered_write, "compiled": compiled_write, "published loop": published_write}
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
        "write": Workload(size, {n: lambda f=f: f(query, x) for n, f in writes.items()}, write_flops),
        "write, equal rows": Workload(size, {n: lambda f=f: f(equal_rows, x) for n, f in writes.items()}, write_flops),
        "write, backward": Workload(2 * size, {n: backward_of(f, query, x) for n, f in writes.items()}),
        # The few listed tokens are next to nothing beside the gradient of all.
        "write, equal rows, backward": Workload(size, {n: backward_of(f, equal_rows, x) for n, f in writes.items()}),
        "write, forward and backward": Workload(
            3 * size,
            {n: trained(f, query, x) for n, f in writes.items()},
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
        # The kernels of "select" less the product, which has just written the logits: they come from the second-level
        # cache where it holds them, and so may go below the memory's floor. No ratio: which kernels of torch.topk are
        # not the product's no name tells.
        result["selection of ready logits"] = Workload(
            4.0 * TOKENS * ROWS,
            {"ait": lambda: ait.ops.bottleneck_select(query[None], x, CAPACITY)},
            kernels=SELECTION_KERNELS,
        )
    return result
