"""The table of shared memory in csrc/cuda/README.md is what the build and the operators say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.common import needs_kernels

from .build import ROOT
from .resources import DEVICES, dynamic_bytes, records, table

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]


@pytest.mark.skipif(not records(), reason="needs a build with CUDA kernels in this checkout")
def test_the_readme_shows_the_shared_memory_of_every_kernel_at_the_default_shape(library: Path) -> None:
    assert "\n".join(table(library)) in (ROOT / "csrc" / "cuda" / "README.md").read_text()


def test_every_kernel_fits_on_every_device_at_the_default_shape(library: Path) -> None:
    for shared_bytes, multiprocessors in DEVICES.values():
        asked = dynamic_bytes(library, shared_bytes, multiprocessors)
        assert asked["hopfield_forward"] > 0 and max(asked.values()) <= shared_bytes
