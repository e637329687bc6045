"""The operators: checked front ends of ``torch.ops.ait``."""

from ait.ops.bottleneck_attend import bottleneck_attend
from ait.ops.bottleneck_select import bottleneck_select
from ait.ops.hopfield_retrieve import hopfield_energy, hopfield_retrieve
from ait.ops.memory_snapshot import memory_snapshot

__all__ = [
    "bottleneck_attend",
    "bottleneck_select",
    "hopfield_energy",
    "hopfield_retrieve",
    "memory_snapshot",
]
