"""ait: the Associative Transformer's global workspace layer for PyTorch."""

from ait import ops
from ait._config import show_config
from ait._version import __version__

__all__ = ["__version__", "ops", "show_config"]
