"""Checkpoints of the authors' released code as models of this package; ``python -m ait.convert --help``."""

from ait.convert.released import Converted, convert_released, convert_released_layer

__all__ = ["Converted", "convert_released", "convert_released_layer"]
