"""Workspaces in models that others built: timm, torchvision, transformers, and whatever is laid out like them."""

from ait.integrations.inserted import InsertedLayer, InsertedWorkspace
from ait.integrations.insertion import insert_workspace, remove_workspace

__all__ = ["InsertedLayer", "InsertedWorkspace", "insert_workspace", "remove_workspace"]
