"""Shared memory of every kernel that runs at the default shape, as csrc/cuda/README.md shows it.

    python -m tests.cuda_on_host.resources

Static bytes are those that ptxas reported to the build in this checkout; dynamic ones are what the operators ask for
where launches are recorded and nothing runs.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from pathlib import Path

from .build import ROOT, build, operator_sources
from .conftest import run_python

# Shared memory that a block can ask for, and multiprocessors: A100, H100 to B200, RTX PRO 6000.
DEVICES = {"sm_80": (163 * 1024, 108), "sm_90, sm_100": (227 * 1024, 132), "sm_120": (99 * 1024, 188)}
# Of each operator the kernels in the order of their launches, bfloat16 tokens; the library's products are none of them.
KERNELS = {
    "bottleneck_select": ["split_in_terms", *["select_chunk"] * 3],
    "bottleneck_attend": ["attend_parts"],
    "bottleneck_attend_backward": [
        "attend_offsets",
        "attend_backward_parts",
        "attend_backward_sort",
        "attend_backward_slabs",
    ],
    "hopfield_retrieve": ["hopfield_pack", "hopfield_forward"],
    "hopfield_retrieve_backward": [
        "hopfield_pack",
        "hopfield_backward",
        "hopfield_grad_patterns",
        "hopfield_reduce_patterns",
    ],
}
PROGRAM = """
import json, torch, ait
from tests.cuda_on_host.plugin import take_launches
T, E, R, k, M = 32768, 768, 256, 512, 32
query, patterns, x = torch.zeros(1, R, E), torch.zeros(M, E), torch.zeros(T, E, dtype=torch.bfloat16)
ops, launches = torch.ops.ait, {}

def recorded(name, *arguments):
    outputs = getattr(ops, name)(*arguments)
    launches[name] = [tuple(launch) for launch in take_launches()]
    return outputs

_, indices = recorded("bottleneck_select", query, x, k)
saved = query[0], x, indices[0]
pooled, gates, _ = recorded("bottleneck_attend", *saved)
recorded("bottleneck_attend_backward", pooled, None, None, *saved, pooled, gates)
out, taken, _ = recorded("hopfield_retrieve", x, patterns, 1.0, 1, 0.0)
recorded("hopfield_retrieve_backward", out, x, patterns, taken, 1.0, 1)
print(json.dumps(launches))
"""


def dynamic_bytes(library: Path, shared_bytes: int, multiprocessors: int) -> dict[str, int]:
    """What each kernel asks for at the default shape on such a device, in bytes."""
    result = run_python(library, "-c", PROGRAM, settings=f"1,{shared_bytes},{multiprocessors},1,-1")
    assert result.returncode == 0, result.stderr
    launches = json.loads(result.stdout.splitlines()[-1])
    most: dict[str, int] = {}
    for operator, names in KERNELS.items():
        asked = [shared for _, threads, shared in launches[operator] if threads > 0]
        for name, shared in zip(names, asked, strict=True):
            most[name] = max(most.get(name, 0), shared)
    return most


def records() -> dict[str, dict[str, int]]:
    """What ptxas reported to this checkout's build, by mangled name and architecture; empty where there is none."""
    folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cuda"
    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.json")):
        found |= json.loads(path.read_text())
    return found


def static_bytes(kernel: str) -> int:
    """The most static shared memory of a kernel, over types and architectures."""
    mangled = re.compile(rf"_ZN3ait4cuda{len(kernel)}{kernel}[IE]")
    return max(use["static_shared_bytes"] for name, use in records().items() if mangled.match(name))


def dynamic_by_device(library: Path) -> dict[str, dict[str, int]]:
    """:func:`dynamic_bytes` of every kind of device."""
    return {name: dynamic_bytes(library, *limits) for name, limits in DEVICES.items()}


def table(dynamic: dict[str, dict[str, int]]) -> list[str]:
    """Lines of Markdown."""
    lines = [f"| kernel | static | {' | '.join(f'dynamic, {name}' for name in dynamic)} |", "|---" * 5 + "|"]
    for kernel in next(iter(dynamic.values())):
        sizes = [static_bytes(kernel), *(asked[kernel] for asked in dynamic.values())]
        lines.append(f"| `{kernel}` | {' | '.join(f'{size:,}' for size in sizes)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(dynamic_by_device(build(operator_sources())))))
