"""What the operators launch at the default shape, and at shapes too large to run: the launches alone, nothing runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.common import needs_kernels

from .conftest import run_python

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]

H200 = "1,232448,132,1,-1"
# Bytes that calls allocate while they run, all that they return included.
PRELUDE = """
import torch, ait
from torch.profiler import profile
from tests.cuda_on_host.plugin import take_launches

def peak_bytes(call):
    with profile(profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, result

T, E, R, k, M = 32768, 768, 256, 512, 32
query, patterns = torch.zeros(1, R, E), torch.zeros(M, E)
"""

DEFAULT_SHAPE = (
    PRELUDE
    + """
# float16 is converted to float32, so its chunks are shorter.
for dtype, selection_dtype, most in (
    (torch.bfloat16, None, 8),
    (torch.float32, None, 7),
    (torch.float16, None, 9),
    (torch.float32, torch.bfloat16, 7),
):
    x = torch.zeros(T, E, dtype=dtype)
    select_bytes, (_, indices) = peak_bytes(
        lambda: torch.ops.ait.bottleneck_select(query, x, k, None, selection_dtype)
    )
    attend_bytes, (pooled, gates, lse) = peak_bytes(lambda: torch.ops.ait.bottleneck_attend(query[0], x, indices[0]))
    forward = take_launches()
    saved = query[0], x, indices[0], pooled, gates
    backward_bytes, _ = peak_bytes(lambda: torch.ops.ait.bottleneck_attend_backward(pooled, None, None, *saved))
    backward = take_launches()
    assert len(forward) <= most and len(backward) <= 6, (dtype, forward, backward)
    kept = R * k * 16 + R * E * 4  # of the selection and of attention, for the backward
    token_gradient = x.numel() * x.element_size()
    extra = max(select_bytes, kept + attend_bytes, kept + backward_bytes - token_gradient)
    assert extra <= 40e6, (dtype, extra)
    print(dtype, selection_dtype, len(forward), len(backward), extra)
    print([tuple(launch) for launch in (*forward, *backward)])
"""
)


def test_launches_and_memory_at_the_default_shape(library: Path) -> None:
    result = run_python(library, "-c", DEFAULT_SHAPE, settings=H200)
    assert result.returncode == 0, result.stderr
    print(result.stdout)


DENSE_PATH = (
    PRELUDE
    + """
R, k, T, E = 256, 4096, 8192, 256
for dtype, more in ((torch.bfloat16, 1), (torch.float32, 0)):
    query, x, indices = torch.zeros(R, E), torch.zeros(T, E, dtype=dtype), torch.zeros(R, k, dtype=torch.int64)
    chunks = 1
    outputs = torch.ops.ait.bottleneck_attend(query, x, indices)
    forward = take_launches()
    torch.ops.ait.bottleneck_attend_backward(*outputs, query, x, indices, *outputs[:2])
    backward = take_launches()
    assert len(forward) == 2 + more + 5 * chunks and len(backward) == 6 + more + 9 * chunks, (forward, backward)
    assert sum(launch.threads == 0 for launch in forward) == 2 * chunks  # products of the library
"""
)


def test_the_dense_path_is_taken_where_rows_list_half_of_the_tokens(library: Path) -> None:
    result = run_python(library, "-c", DENSE_PATH, settings=H200)
    assert result.returncode == 0, result.stderr


# Only addresses are asked for: no page of these tensors is ever touched.
BEYOND_INT32 = (
    PRELUDE
    + """
T, E = 1_500_000, 1536
assert T * E > 2**31
x = torch.empty(T, E, dtype=torch.bfloat16)
query = torch.empty(1, 8, E)
values, indices = torch.ops.ait.bottleneck_select(query, x, 64)
selection = take_launches()
assert sum(launch.shared_bytes for launch in selection if launch.threads == 0) == T  # columns of the products
outputs = torch.ops.ait.bottleneck_attend(query[0], x, indices[0])
torch.ops.ait.bottleneck_attend_backward(*outputs, query[0], x, indices[0], *outputs[:2])
out, taken, _ = torch.ops.ait.hopfield_retrieve(x, torch.empty(M, E), 1.0, 3, 0.0)
torch.ops.ait.hopfield_retrieve_backward(out, x, torch.empty(M, E), taken, 1.0, 3)
assert all(0 < launch.blocks < 2**31 and launch.threads <= 1024 for launch in take_launches())
"""
)


def test_more_than_two_to_the_31_elements_are_launched(library: Path) -> None:
    result = run_python(library, "-c", BEYOND_INT32, settings=H200)
    assert result.returncode == 0, result.stderr
