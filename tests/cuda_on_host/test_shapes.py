"""Sizes of launches, and what depends on how tokens are cut into chunks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.ops.common import needs_kernels

from .build import HERE, ROOT, compiler
from .conftest import run_python

pytestmark = pytest.mark.xdist_group("cuda_on_host")


def test_launch_sizes_fit_every_device_and_cover_every_shape(tmp_path: Path) -> None:
    program = tmp_path / "shapes"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    command = [compiler(), *flags, f"-I{ROOT / 'csrc'}", str(HERE / "shapes.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


SELECT_FROM_SEVERAL_CHUNKS = """
import torch, ait, tests.cuda_on_host.plugin
from ait.ops import reference
g = torch.Generator().manual_seed(0)
for dtype, tokens in ((torch.float64, 20000), (torch.bfloat16, 40000)):
    # Small integers: logits are exact, and most of them tie across chunks.
    query = (2 * torch.randn(1, 2, 3, generator=g)).round().to(reference.accumulate_dtype(dtype))
    x = (2 * torch.randn(tokens, 3, generator=g)).round().to(dtype)
    for mask in (None, torch.rand(tokens, generator=g) < 0.3):
        for k in (1, 300, tokens):
            actual = ait.ops.bottleneck_select(query, x, k, mask)
            expected = reference.bottleneck_select(query, x, k, mask)
            assert torch.equal(actual[1], expected[1]) and torch.equal(actual[0], expected[0]), (dtype, k)
# A float32 query is worth more than its leading bits: three bfloat16 terms hold all of it.
query = torch.randn(1, 20, 40, generator=g)
x = torch.randn(500, 40, generator=g).bfloat16()
values, indices = ait.ops.bottleneck_select(query, x, 500)
expected = (query[0].double() @ x.double().T)
assert (values[0] - expected).abs().max() < 2e-5, (values[0] - expected).abs().max()
"""


@needs_kernels
def test_selection_merges_chunks_and_splits_the_query_exactly(library: Path) -> None:
    result = run_python(library, "-c", SELECT_FROM_SEVERAL_CHUNKS)
    assert result.returncode == 0, result.stderr
