"""How large a model is, counted as the authors count."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ait.nn.memory import Memory


class ParameterCount(NamedTuple):
    """Entries of the parameters, and of the memories that are kept as buffers."""

    parameters: int
    memory_entries: int

    @property
    def total(self) -> int:
        """What the papers call the number of parameters."""
        return self.parameters + self.memory_entries


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts parameters and memory entries.

    Parameters without ``requires_grad`` count, shared ones count once. A memory that is learned by gradient is a
    parameter; any other is counted apart.

    Args:
        model: any module, on any device (``meta`` included).

    Returns:
        Both counts; ``.total`` is their sum, the figure to compare with published ones.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memories = [module.gamma for module in model.modules() if isinstance(module, Memory)]
    entries = sum(gamma.numel() for gamma in memories if not isinstance(gamma, nn.Parameter))
    return ParameterCount(parameters, entries)
