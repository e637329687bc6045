"""ait: the Associative Transformer's global workspace layer for PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

from ait import ops
from ait._config import show_config
from ait._version import __version__
from ait.integrations import (
    freeze_backbone,
    inject_balance_loss,
    insert_workspace,
    load_workspace,
    remove_workspace,
    with_workspace,
    workspace_state_dict,
    workspaces,
)
from ait.models import (
    AssociativeTransformer,
    VisionTransformer,
    count_parameters,
    create_model,
    list_models,
    list_pretrained,
    pretrained_config,
)
from ait.nn.control import balance_loss, balance_losses, freeze_memory, reset_memory
from ait.nn.workspace import GlobalWorkspace, GlobalWorkspaceLayer
from ait.recording import MemoryHistory, Trace, WorkspaceLogger, record

__all__ = [
    "AssociativeTransformer",
    "GlobalWorkspace",
    "GlobalWorkspaceLayer",
    "MemoryHistory",
    "Trace",
    "VisionTransformer",
    "WorkspaceLogger",
    "__version__",
    "balance_loss",
    "balance_losses",
    "count_parameters",
    "create_model",
    "freeze_backbone",
    "freeze_memory",
    "inject_balance_loss",
    "insert_workspace",
    "list_models",
    "list_pretrained",
    "load_workspace",
    "ops",
    "pretrained_config",
    "record",
    "remove_workspace",
    "reset_memory",
    "show_config",
    "with_workspace",
    "workspace_state_dict",
    "workspaces",
]


def __getattr__(name: str) -> Any:
    """``ait.viz``, which needs matplotlib and is imported at its first use."""
    if name == "viz":
        return importlib.import_module("ait.viz")
    raise AttributeError(f"module 'ait' has no attribute {name!r}")
