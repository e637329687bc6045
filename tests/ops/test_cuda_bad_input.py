"""Tensors that are not all on one CUDA device: what the front end says, and what libait_cuda.so says where no GPU is.

Fake tensors say that they are on a device that the machine need not have. The kernels check before they touch one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ait
from ait.ops._library import is_pure_python, why_no_cuda_kernels

needs_cuda_build = pytest.mark.skipif(
    is_pure_python() or why_no_cuda_kernels() is not None, reason="needs a build with CUDA kernels"
)

T, E, R, K, M = 9, 8, 2, 4, 3
# By operator: its tensors in their order, with shape and dtype; and what stands between and after them in a call.
FLOAT = torch.float32
TENSORS: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
    "bottleneck_select": {"query": ((1, R, E), FLOAT), "tokens": ((T, E), FLOAT), "mask": ((T,), torch.bool)},
    "bottleneck_attend": {"query": ((R, E), FLOAT), "tokens": ((T, E), FLOAT), "indices": ((R, K), torch.int64)},
    "bottleneck_attend_backward": {
        "grad_pooled": ((R, E), FLOAT),
        "grad_gates": ((R, K), FLOAT),
        "grad_lse": ((R,), FLOAT),
        "query": ((R, E), FLOAT),
        "tokens": ((T, E), FLOAT),
        "indices": ((R, K), torch.int64),
        "pooled": ((R, E), FLOAT),
        "gates": ((R, K), FLOAT),
    },
    "hopfield_retrieve": {"state": ((T, E), FLOAT), "patterns": ((M, E), FLOAT)},
    "hopfield_retrieve_backward": {
        "grad_out": ((T, E), FLOAT),
        "state": ((T, E), FLOAT),
        "patterns": ((M, E), FLOAT),
        "steps_taken": ((T,), torch.int64),
    },
}
CALLS: dict[str, Callable[..., tuple[object, ...]]] = {
    "bottleneck_select": lambda query, tokens, mask: (query, tokens, K, mask, None),
    "hopfield_retrieve": lambda state, patterns: (state, patterns, 1.0, 1, 0.0),
    "hopfield_retrieve_backward": lambda *tensors: (*tensors, 1.0, 1),
}
FIRST = {name: "state" if name.startswith("hopfield") else "query" for name in TENSORS}  # which decides the device


def arguments(operator: str, devices: dict[str, str]) -> tuple[object, ...]:
    """Fake tensors on ``cuda:1``, but for those that ``devices`` names."""
    tensors: list[Tensor] = []
    with FakeTensorMode():
        for name, (shape, dtype) in TENSORS[operator].items():
            tensors.append(torch.zeros(shape, dtype=dtype, device=devices.get(name, "cuda:1")))
    return CALLS.get(operator, lambda *tensors: tensors)(*tensors)


CASES = [(operator, name) for operator, tensors in TENSORS.items() for name in tensors if name != FIRST[operator]]


@needs_cuda_build
@pytest.mark.parametrize(("operator", "argument"), CASES)
@pytest.mark.parametrize(("device", "told"), [("cpu", "no CUDA device"), ("cuda:0", "cuda:0")])
def test_the_cuda_library_names_the_tensor_that_is_elsewhere(
    device: str, told: str, operator: str, argument: str
) -> None:
    kernel = torch.library.get_kernel(f"ait::{operator}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    name = operator.removesuffix("_backward")
    with pytest.raises(RuntimeError, match=f"{name}: expected {argument} on cuda:1, got a tensor on {told}$"):
        kernel.call_boxed(keys, *arguments(operator, {argument: device}))


@needs_cuda_build
@pytest.mark.parametrize("operator", TENSORS)
def test_the_cuda_library_refuses_tensors_of_the_cpu(operator: str) -> None:
    kernel = torch.library.get_kernel(f"ait::{operator}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    name = operator.removesuffix("_backward")
    message = f"{name}: expected {FIRST[operator]} on a CUDA device, got a tensor on no CUDA device$"
    with pytest.raises(RuntimeError, match=message):
        kernel.call_boxed(keys, *arguments(operator, dict.fromkeys(TENSORS[operator], "cpu")))


FRONT_ENDS = {
    "bottleneck_select": lambda query, tokens, k, mask, _: ait.ops.bottleneck_select(query, tokens, k, mask),
    "bottleneck_attend": ait.ops.bottleneck_attend,
    "hopfield_retrieve": lambda state, patterns, *_: ait.ops.hopfield_retrieve(state, patterns),
}
WHAT_IS_ASKED = {"bottleneck_select": "tokens", "bottleneck_attend": "tokens", "hopfield_retrieve": "state"}


@pytest.mark.parametrize(
    ("operator", "argument"),
    [(operator, name) for operator, asked in WHAT_IS_ASKED.items() for name in TENSORS[operator] if name != asked],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_front_end_names_the_tensor_that_is_elsewhere(device: str, operator: str, argument: str) -> None:
    expected = f"{operator}: expected {argument} on the device of {WHAT_IS_ASKED[operator]}, cuda:1, got {device}"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        FRONT_ENDS[operator](*arguments(operator, {argument: device}))
