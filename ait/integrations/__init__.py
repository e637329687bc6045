"""Workspaces in models that others built: timm, torchvision, transformers, and whatever is laid out like them."""

from ait.integrations.freeze import freeze_backbone
from ait.integrations.inject import BalanceInjection, inject_balance_loss
from ait.integrations.inserted import InsertedLayer, InsertedWorkspace
from ait.integrations.insertion import insert_workspace, remove_workspace
from ait.integrations.pretrained import with_workspace
from ait.integrations.state import load_workspace, workspace_state_dict
from ait.integrations.summary import workspaces

__all__ = [
    "BalanceInjection",
    "InsertedLayer",
    "InsertedWorkspace",
    "freeze_backbone",
    "inject_balance_loss",
    "insert_workspace",
    "load_workspace",
    "remove_workspace",
    "with_workspace",
    "workspace_state_dict",
    "workspaces",
]
