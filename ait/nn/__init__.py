"""Layers: the global workspace, and the blocks around it."""

from ait.nn.control import balance_loss, balance_losses, freeze_memory, reset_memory
from ait.nn.workspace import GlobalWorkspace, GlobalWorkspaceLayer

__all__ = [
    "GlobalWorkspace",
    "GlobalWorkspaceLayer",
    "balance_loss",
    "balance_losses",
    "freeze_memory",
    "reset_memory",
]
