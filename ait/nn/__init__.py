"""Layers: the global workspace, and the blocks around it."""

from ait.nn.attention import Attention
from ait.nn.block import Block, Mlp
from ait.nn.control import balance_loss, balance_losses, freeze_memory, reset_memory
from ait.nn.patch_embed import PatchEmbed, TokenEmbed
from ait.nn.workspace import GlobalWorkspace, GlobalWorkspaceLayer

__all__ = [
    "Attention",
    "Block",
    "GlobalWorkspace",
    "GlobalWorkspaceLayer",
    "Mlp",
    "PatchEmbed",
    "TokenEmbed",
    "balance_loss",
    "balance_losses",
    "freeze_memory",
    "reset_memory",
]
