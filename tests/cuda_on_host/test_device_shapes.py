"""What tests/gpu and make gpu-check take for granted of the launches: looked up here, where nothing has to run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_workloads import SELECTION_KERNELS

from tests.ops.common import needs_kernels

from .build import ROOT
from .conftest import run_python

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]

# Shared memory and multiprocessors: H200, A100, and an RTX of capability 12.0.
DEVICES = ("1,232448,132,1,-1", "1,166912,108,1,-1", "1,101376,170,1,-1")

PATHS = """
import torch, ait
from tests.cuda_on_host.plugin import take_launches
from tests.gpu.test_on_device import ATTEND_SHAPES, DENSE_SHAPE, SLAB_SHAPE

for shape, by_slabs in ((SLAB_SHAPE, True), (DENSE_SHAPE, False)):
    assert shape in ATTEND_SHAPES
    rows, entries, tokens, width = shape
    for dtype in (torch.float32, torch.bfloat16):
        query, x = torch.zeros(rows, width), torch.zeros(tokens, width, dtype=dtype)
        indices = torch.zeros(rows, entries, dtype=torch.int64)
        outputs = torch.ops.ait.bottleneck_attend(query, x, indices)
        forward = take_launches()
        torch.ops.ait.bottleneck_attend_backward(*outputs, query, x, indices, *outputs[:2])
        backward = take_launches()
        for launches in (forward, backward):  # products of the library have no threads
            assert any(launch.threads == 0 for launch in launches) is not by_slabs, (shape, dtype, launches)
        slabs = [launch for launch in backward if launch.threads == 1024]
        assert len(slabs) == by_slabs, (shape, dtype, backward)
        for launch in slabs:  # the last slab is a broken one: half of its bytes are the query's
            columns = launch.shared_bytes // (2 * 4 * rows)
            assert width > columns and width % columns != 0, (columns, width)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_shapes_for_the_sanitizer_and_graphs_take_slabs_and_the_dense_path(library: Path, device: str) -> None:
    result = run_python(library, "-c", PATHS, settings=device)
    assert result.returncode == 0, result.stderr


CHUNKS = """
import sys
sys.path.insert(0, "experiments/bench")
import torch, ait
from gpu_workloads import CAPACITY, ROWS, SELECTION_KERNELS, TOKENS, WIDTH
from tests.cuda_on_host.plugin import take_launches

torch.ops.ait.bottleneck_select(torch.zeros(1, ROWS, WIDTH), torch.zeros(TOKENS, WIDTH), CAPACITY)
kernels = [launch for launch in take_launches() if launch.threads > 0]
assert len(kernels) == SELECTION_KERNELS.launches, kernels
"""


def test_a_selection_launches_as_many_kernels_as_are_timed(library: Path) -> None:
    result = run_python(library, "-c", CHUNKS, settings=DEVICES[0])
    assert result.returncode == 0, result.stderr
    header = (ROOT / "csrc" / "cuda" / "bottleneck_select_kernel.h").read_text()
    assert re.findall(r"__global__[^{]* (\w+)\(Select", header) == [SELECTION_KERNELS.name]
