from __future__ import annotations

import pytest
import torch
from torch import nn

from ait.nn.attention import Attention
from ait.nn.block import Block, Mlp
from tests.gradients import assert_close_with_gradients


def randomise(module: nn.Module) -> nn.Module:
    """Moves LayerNorms off the identity, so that a wrong or missing one shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def direct_layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("with_attention", [True, False])
def test_block_is_pre_norm_with_two_residuals(with_attention: bool) -> None:
    torch.manual_seed(0)
    attn = Attention(32, head_dim=16, dtype=torch.float64) if with_attention else None
    block = randomise(Block(32, attn=attn, mlp=Mlp(32, dtype=torch.float64), dtype=torch.float64))
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)

    expected = x
    if with_attention:
        expected = expected + attn(direct_layer_norm(expected, block.norm1))
    hidden = direct_layer_norm(expected, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    expected = expected + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias

    assert_close_with_gradients(block(x), expected, {"x": x, **dict(block.named_parameters())})


def test_block_without_attention_holds_no_norm_for_it() -> None:
    block = Block(32, attn=None, mlp=nn.Identity())
    assert [name for name, _ in block.named_parameters()] == ["norm2.weight", "norm2.bias"]


def test_mlp_is_four_times_as_wide_inside_unless_told() -> None:
    assert Mlp(8).fc1.weight.shape == (32, 8)
    assert Mlp(8, hidden_dim=12).fc2.weight.shape == (8, 12)


@pytest.mark.parametrize("arguments", [{"dim": 0}, {"dim": 8, "hidden_dim": -1}, {"dim": 8, "hidden_dim": 2.5}])
def test_mlp_refuses_bad_widths(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"Mlp: expected (hidden_)?dim"):
        Mlp(**arguments)
