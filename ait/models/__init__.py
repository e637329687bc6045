"""The Associative Transformer, what it is compared with, and a registry of both."""

from ait.models.ait import AssociativeTransformer
from ait.models.count import ParameterCount, count_parameters
from ait.models.pretrained import PretrainedConfig, list_pretrained, load_pretrained, pretrained_config
from ait.models.registry import create_model, list_models
from ait.models.shell import TransformerShell
from ait.models.vit import VisionTransformer

__all__ = [
    "AssociativeTransformer",
    "ParameterCount",
    "PretrainedConfig",
    "TransformerShell",
    "VisionTransformer",
    "count_parameters",
    "create_model",
    "list_models",
    "list_pretrained",
    "load_pretrained",
    "pretrained_config",
]
