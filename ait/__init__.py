"""ait: the Associative Transformer's global workspace layer for PyTorch."""

from ait import ops

__all__ = ["ops"]
