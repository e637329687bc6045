"""The first use of the CUDA kernels on a device: they are compared with the reference on a small input."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ait.ops import reference
from ait.ops._library import LIBRARY, SCHEMAS, device_of, is_pure_python, why_no_cuda_kernels

DEVICE_TYPE = "cuda"  # whose kernels are compared
# What a wrong kernel exceeds and rounding does not, in parts of the largest number of a result, by the dtype of the
# tokens: sums of some hundred products; for bfloat16 also the terms that the dense path leaves out. The rounding of a
# result to its own dtype comes on top, at most one unit in its last place.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-4}
# What was found, device by device: the operators whose kernels are wrong there. It lasts as long as the process, as
# what it entails in the dispatcher does.
VERDICTS: dict[torch.device, list[str]] = {}


def check_first_use(tensor: Tensor) -> None:
    """Compares the CUDA kernels with the reference when a device is used first.

    An operator that disagrees is reported, and the reference runs in its place on that device from then on. Where the
    first use is a trace (``torch.compile``), the comparison is made while tracing. Nothing happens for tensors
    elsewhere, for fake tensors, and during the capture of a CUDA graph, which says so.

    Raises:
        RuntimeError: a kernel disagrees and ``AIT_REQUIRE_KERNELS=1``.
    """
    if tensor.device.type != DEVICE_TYPE or is_pure_python():
        return
    if torch.compiler.is_compiling():
        _check_while_tracing(tensor.device.index)
    elif not isinstance(tensor, FakeTensor):
        _check(tensor.device)


@torch.compiler.assume_constant_result
def _check_while_tracing(index: int | None) -> bool:
    """The same for the device of a traced tensor; the call leaves nothing in the graph."""
    _check(torch.device(DEVICE_TYPE, *([] if index is None else [index])))
    return True


def _check(device: torch.device) -> None:
    if device in VERDICTS or not _has_kernels():
        return
    if _is_capturing(device):
        _say_that_capture_skips_the_check(device)
        return
    # No mode of a caller's, which may trace or count, sees the comparison.
    with _disable_current_modes():
        VERDICTS[device] = replace_wrong_kernels(device, "CUDA")


def _has_kernels() -> bool:
    return why_no_cuda_kernels() is None and torch.cuda.is_available()


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on a stream of ``device``, or on one of the current device.

    The capture of one device's work forbids others, too, to allocate.
    """
    if torch.cuda.is_current_stream_capturing():
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def _say_that_capture_skips_the_check(device: torch.device) -> None:
    warnings.warn(
        f"ait: the comparison of its CUDA kernels with the reference on {device} was skipped, since a CUDA graph is "
        "being captured; one call before the capture makes it",
        RuntimeWarning,
        stacklevel=5,
    )


def replace_wrong_kernels(device: torch.device, dispatch_key: str) -> list[str]:
    """Puts the reference in place of every operator that disagrees with it on ``device``; returns their names."""
    # Neither a caller's autocast nor a default device of theirs has a part in it.
    with torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        wrong = [name for name, agrees in COMPARISONS.items() if not agrees(device)]
    if wrong:
        message = (
            f"ait: on {device} the kernels of {', '.join(wrong)} disagree with the reference operators, which run "
            "there instead; please report it with the output of ait.show_config()"
        )
        if os.environ.get("AIT_REQUIRE_KERNELS") == "1":
            raise RuntimeError(message + "; AIT_REQUIRE_KERNELS=1 makes this an error")
        warnings.warn(message, RuntimeWarning, stacklevel=5)
    for name in wrong:
        for operator in (name, f"{name}_backward"):
            if operator in SCHEMAS:
                _replace_on(device, operator, dispatch_key)
    return wrong


def _replace_on(device: torch.device, operator: str, dispatch_key: str) -> None:
    """Runs the reference for calls on ``device``; other devices keep what they have, be it a kernel or this."""
    kernel = torch.library.get_kernel(f"ait::{operator}", dispatch_key)
    run_reference = getattr(reference, operator)

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        return run_reference(*args) if device_of(args) == device else kernel.call_boxed(keyset, *args)

    LIBRARY.impl(operator, run, dispatch_key, with_keyset=True, allow_override=True)


def _close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> bool:
    """Whether outputs agree with those of the reference, rounded to their dtype; integers have to be equal."""
    return all(_agree(a.cpu(), e.to(a.dtype), tolerance) for a, e in zip(actual, expected, strict=True))


def _agree(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not actual.is_floating_point() or tolerance == 0:
        return torch.equal(actual, expected)
    largest, last_place = float(expected.abs().max()), torch.finfo(actual.dtype).eps
    return torch.allclose(actual.double(), expected.double(), rtol=last_place, atol=tolerance * largest)


def _numbers(*shape: int, step: float) -> Tensor:
    """Numbers in [-1, 1] that no generator is needed for, so that none is advanced."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * step).reshape(shape)


# The reference runs on the CPU in float64, where no setting (TF32, say) makes products less accurate.


@torch.no_grad()
def _selection_agrees(device: torch.device) -> bool:
    """One chunk and several; logits are exact, and many of them are equal: multiples of one number.

    For bfloat16 that number has bits far apart, so that each of the three terms of the query counts.
    """
    for dtype in TOLERANCE:
        for num_tokens, k in ((70, 9), (17_000, 40)):
            query = ((4 * _numbers(1, 2, 8, step=0.7)).round() / 4).to(reference.accumulate_dtype(dtype))
            if dtype == torch.bfloat16:
                query *= 1 + 2**-9 + 2**-17
            tokens = (4 * _numbers(num_tokens, 8, step=1.3)).round() / 4
            mask = torch.arange(num_tokens) % 7 == 3
            moved = query.to(device), tokens.to(device, dtype), k, mask.to(device), None
            expected = reference.bottleneck_select(query.double(), tokens, k, mask, None)
            if not _close(torch.ops.ait.bottleneck_select(*moved), expected, tolerance=0):
                return False
    return True


@torch.no_grad()
def _attention_agrees(device: torch.device) -> bool:
    # Rows beyond a warp, and a list that ends early.
    short = torch.arange(0, 54, 6) + torch.arange(34)[:, None] % 16
    short[2, 4:] = -1
    # A shape for which gradients of tokens are summed by slabs: several of them and, where a device has some
    # multiprocessors, two ranges of tokens; whole tiles of a list and broken ones, in several parts. Rows that list
    # nothing cost the reference nothing.
    middling = torch.full((64, 320), -1)
    middling[[0, 1, 2, 31, 32, 63], :131] = 7 + torch.arange(131) * torch.tensor([1, 1, 2, 2, 7, 7])[:, None]
    # One for which the dense path is taken. In float32 it may be told to use TF32, and would then differ from the
    # reference.
    long = torch.full((256, 1024), -1)
    long[[0, 1, 2, 32, 255], :99] = torch.arange(1, 100)
    for dtype, indices, num_tokens, width in (
        *((dtype, short, 70, 20) for dtype in TOLERANCE),
        *((dtype, middling, 1030, 200) for dtype in TOLERANCE),
        (torch.bfloat16, long, 100, 512),
    ):
        query = (_numbers(indices.shape[0], width, step=0.7) / 4).to(reference.accumulate_dtype(dtype))
        tokens = _numbers(num_tokens, width, step=1.3).to(dtype)
        moved = query.to(device), tokens.to(device), indices.to(device)
        listing = indices[:, 0] >= 0
        wide = query[listing].double(), tokens.double(), indices[listing]
        outputs, expected = torch.ops.ait.bottleneck_attend(*moved), reference.bottleneck_attend(*wide)
        if not _close(tuple(x.cpu()[listing] for x in outputs), expected, TOLERANCE[dtype]):
            return False
        # Outputs stand for incoming gradients; those of an empty row do not matter.
        grad_query, grad_tokens = torch.ops.ait.bottleneck_attend_backward(*outputs, *moved, *outputs[:2])
        gradients = reference.bottleneck_attend_backward(*expected, *wide, *expected[:2])
        if not _close((grad_query.cpu()[listing], grad_tokens), gradients, TOLERANCE[dtype]):
            return False
    return True


@torch.no_grad()
def _retrieval_agrees(device: torch.device) -> bool:
    """Broken tiles, and whole ones with a broken one behind: 32 tokens, 32 patterns and 32 columns are one."""
    for dtype, tolerance in TOLERANCE.items():
        for num_patterns, width in ((5, 20), (33, 72)):
            patterns = _numbers(num_patterns, width, step=0.9).to(reference.accumulate_dtype(dtype))
            tokens = _numbers(70, width, step=1.3).to(dtype)
            moved, wide = (tokens.to(device), patterns.to(device)), (tokens.double(), patterns.double())
            for steps in (1, 3):
                outputs = torch.ops.ait.hopfield_retrieve(*moved, 0.3, steps, 0.0)
                expected = reference.hopfield_retrieve(*wide, 0.3, steps, 0.0)
                if not _close(outputs, expected, tolerance):
                    return False
                backward = torch.ops.ait.hopfield_retrieve_backward(moved[0], *moved, outputs[1], 0.3, steps)
                gradients = reference.hopfield_retrieve_backward(wide[0], *wide, expected[1], 0.3, steps)
                if not _close(backward, gradients, tolerance):
                    return False
    return True


# For each operator: whether it and its backward agree with the reference on a device.
COMPARISONS: dict[str, Callable[[torch.device], bool]] = {
    "bottleneck_select": _selection_agrees,
    "bottleneck_attend": _attention_agrees,
    "hopfield_retrieve": _retrieval_agrees,
}
