"""The first use of the CUDA kernels on a device: they are compared with the reference on a small input."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ait.ops import reference
from ait.ops._library import LIBRARY, is_pure_python, why_no_cuda_kernels

# What a wrong kernel exceeds and rounding does not: sums of some dozen terms, in float32.
TOLERANCE = 1e-4


def check_first_use(tensor: Tensor) -> None:
    """Compares the CUDA kernels with the reference when a device is used first.

    An operator that disagrees is reported, and the reference runs in its place from then on. Nothing happens for
    tensors elsewhere, while tracing (``torch.compile``), and during the capture of a CUDA graph, which says so.

    Raises:
        RuntimeError: a kernel disagrees and ``AIT_REQUIRE_KERNELS=1``.
    """
    if tensor.device.type != "cuda" or torch.compiler.is_compiling() or is_pure_python():
        return
    if why_no_cuda_kernels() is not None:
        return
    if torch.cuda.is_current_stream_capturing():
        _say_that_capture_skips_the_check()
        return
    _check_device(tensor.device)


@functools.cache
def _say_that_capture_skips_the_check() -> None:
    warnings.warn(
        "ait: the comparison of its CUDA kernels with the reference was skipped, since a CUDA graph is being captured; "
        "one call before the capture makes it",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def _check_device(device: torch.device) -> None:
    replace_wrong_kernels(device, "CUDA")


def replace_wrong_kernels(device: torch.device, dispatch_key: str) -> list[str]:
    """Puts the reference in place of every operator that disagrees with it on ``device``; returns their names."""
    wrong = [name for name, agrees in _comparisons(device).items() if not agrees()]
    if wrong:
        message = (
            f"ait: on {device} the kernels of {', '.join(wrong)} disagree with the reference operators, which run "
            "instead; please report it with the output of ait.show_config()"
        )
        if os.environ.get("AIT_REQUIRE_KERNELS") == "1":
            raise RuntimeError(message + "; AIT_REQUIRE_KERNELS=1 makes this an error")
        warnings.warn(message, RuntimeWarning, stacklevel=5)
    for name in wrong:
        for operator in (name, f"{name}_backward"):
            if hasattr(reference, operator):
                LIBRARY.impl(operator, getattr(reference, operator), dispatch_key, allow_override=True)
    return wrong


def _close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether outputs agree; integers have to be equal."""
    return all(
        torch.allclose(a.double(), e.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if a.is_floating_point()
        else torch.equal(a, e)
        for a, e in zip(actual, expected, strict=True)
    )


def _comparisons(device: torch.device) -> dict[str, Callable[[], bool]]:
    """For each operator: whether it agrees with the reference on inputs that no generator is needed for."""

    def numbers(*shape: int, step: float) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.sin(torch.arange(count, dtype=torch.float32, device=device) * step).reshape(shape)

    query, tokens, patterns = numbers(3, 20, step=0.7), numbers(70, 20, step=1.3), numbers(5, 20, step=0.9)
    mask = torch.arange(70, device=device) % 7 == 3

    @torch.no_grad()
    def select() -> bool:
        # Multiples of 1/4, so that logits are exact, and many of them equal.
        arguments = (4 * query[None]).round() / 4, (4 * tokens).round() / 4, 9, mask, None
        return _close(torch.ops.ait.bottleneck_select(*arguments), reference.bottleneck_select(*arguments))

    @torch.no_grad()
    def attend() -> bool:
        indices = torch.arange(0, 54, 6, device=device) + torch.arange(3, device=device)[:, None]
        indices[2, 4:] = -1
        outputs = reference.bottleneck_attend(query, tokens, indices)
        if not _close(torch.ops.ait.bottleneck_attend(query, tokens, indices), outputs):
            return False
        saved = *outputs, query, tokens, indices, *outputs[:2]
        backward = torch.ops.ait.bottleneck_attend_backward(*saved)
        return _close(backward, reference.bottleneck_attend_backward(*saved))

    @torch.no_grad()
    def retrieve() -> bool:
        for steps in (1, 3):
            outputs = reference.hopfield_retrieve(tokens, patterns, 0.3, steps, 0.0)
            if not _close(torch.ops.ait.hopfield_retrieve(tokens, patterns, 0.3, steps, 0.0), outputs):
                return False
            saved = tokens, tokens, patterns, outputs[1], 0.3, steps
            backward = torch.ops.ait.hopfield_retrieve_backward(*saved)
            if not _close(backward, reference.hopfield_retrieve_backward(*saved)):
                return False
        return True

    return {"bottleneck_select": select, "bottleneck_attend": attend, "hopfield_retrieve": retrieve}
