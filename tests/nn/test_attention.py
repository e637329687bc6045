from __future__ import annotations

import math

import pytest
import torch

from ait.nn.attention import Attention
from tests.gradients import assert_close_with_gradients


def direct_attention(x: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Head by head: qkv are three chunks of the width, and in each the heads are outermost."""
    dim, width = x.shape[-1], attention.head_dim
    query, key, value = (x @ chunk.T for chunk in attention.qkv.weight.split(dim))
    heads = []
    for start in range(0, dim, width):
        q, k, v = (chunk[..., start : start + width] for chunk in (query, key, value))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width), dim=-1) @ v)
    return torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize(("dim", "head_dim", "tokens"), [(128, 64, 7), (96, 32, 16), (24, 24, 1), (6, 1, 5)])
def test_output_and_every_gradient_equal_a_direct_evaluation(dim: int, head_dim: int, tokens: int) -> None:
    torch.manual_seed(0)
    attention = Attention(dim, head_dim=head_dim, dtype=torch.float64)
    x = torch.randn(3, tokens, dim, dtype=torch.float64, requires_grad=True)
    expected = direct_attention(x, attention)
    assert_close_with_gradients(attention(x), expected, {"x": x, **dict(attention.named_parameters())})


def test_an_image_does_not_see_the_others() -> None:
    torch.manual_seed(0)
    attention, x = Attention(64), torch.randn(4, 9, 64)
    other = torch.cat([x[:1], torch.randn(3, 9, 64)])
    assert torch.equal(attention(x)[0], attention(other)[0])


def test_heads_are_64_wide_by_default_qkv_has_no_bias_and_the_output_has_one() -> None:
    attention = Attention(768, device="meta")
    assert attention.num_heads == 12
    shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
    assert shapes == {"qkv.weight": (2304, 768), "proj.weight": (768, 768), "proj.bias": (768,)}


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert Attention(64)(torch.empty(0, 5, 64)).shape == (0, 5, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 100}, r"Attention: expected dim divisible by head_dim=64, got 100"),
        ({"dim": 64, "head_dim": 0}, r"Attention: expected head_dim >= 1, got 0"),
        ({"dim": "64"}, r"Attention: expected dim to be an integer, got '64'"),
    ],
)
def test_bad_widths_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**arguments)


@pytest.mark.parametrize("shape", [(2, 5, 32), (5, 64), (1, 2, 5, 64)])
def test_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Attention: expected input of shape \(B, N, 64\), got \("):
        Attention(64)(torch.zeros(shape))
