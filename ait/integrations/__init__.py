"""Workspaces in models that others built: timm, torchvision, transformers, and whatever is laid out like them."""

from ait.integrations.inserted import InsertedLayer, InsertedWorkspace
from ait.integrations.insertion import insert_workspace, remove_workspace
from ait.integrations.state import load_workspace, workspace_state_dict
from ait.integrations.summary import workspaces

__all__ = [
    "InsertedLayer",
    "InsertedWorkspace",
    "insert_workspace",
    "load_workspace",
    "remove_workspace",
    "workspace_state_dict",
    "workspaces",
]
