"""What all operators refuse alike: no tensors, and forward-mode autograd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import ait

STATE = torch.arange(20.0).view(5, 4) / 20
PATTERNS = torch.arange(12.0).view(3, 4) / 12
INDICES = torch.tensor([[0, 2], [1, -1], [3, 4]])
CALLS = {
    "hopfield_retrieve": lambda x: ait.ops.hopfield_retrieve(x, PATTERNS)[0],
    "bottleneck_attend": lambda x: ait.ops.bottleneck_attend(PATTERNS, x, INDICES)[0],
    "bottleneck_select": lambda x: ait.ops.bottleneck_select(PATTERNS.unsqueeze(0), x, 2)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_autograd_is_an_error_and_not_a_lost_tangent(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode autograd is not implemented"):
        torch.func.jvp(CALLS[name], (STATE,), (STATE,))
    with forward_ad.dual_level():
        assert CALLS[name](STATE).shape[0] > 0, "tensors without a tangent pass"
        with pytest.raises(NotImplementedError, match="has a tangent"):
            CALLS[name](forward_ad.make_dual(STATE, STATE))


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_is_no_tensor_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected (tokens|state) to be a torch.Tensor, got list"):
        CALLS[name]([1.0, 2.0])
