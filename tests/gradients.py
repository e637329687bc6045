"""Comparison of outputs together with every gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.tolerances import assert_close


def assert_close_with_gradients(output: Tensor, expected: Tensor, leaves: Mapping[str, Tensor]) -> None:
    """Asserts that two results of the same leaves agree, and so do the gradients of each leaf, by name."""
    assert_close(output.detach(), expected.detach(), "output")
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent)
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), cotangent)
    for name, grad, expected_grad in zip(leaves, grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, f"gradient of {name}")
