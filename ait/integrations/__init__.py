"""Workspaces in models that others built: timm, torchvision, transformers, and whatever is laid out like them."""

from ait.integrations.inserted import InsertedLayer, InsertedWorkspace

__all__ = ["InsertedLayer", "InsertedWorkspace"]
