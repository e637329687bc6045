"""The table of shared memory in csrc/cuda/README.md is what the build and the operators say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.common import needs_kernels

from .build import ROOT
from .resources import DEVICES, dynamic_by_device, records, table

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]


@pytest.fixture(scope="module")
def dynamic(library: Path) -> dict[str, dict[str, int]]:
    return dynamic_by_device(library)


@pytest.mark.skipif(not records(), reason="needs a build with CUDA kernels in this checkout")
def test_the_readme_shows_the_shared_memory_of_every_kernel_at_the_default_shape(
    dynamic: dict[str, dict[str, int]],
) -> None:
    assert "\n".join(table(dynamic)) in (ROOT / "csrc" / "cuda" / "README.md").read_text()


def test_every_kernel_fits_on_every_device_at_the_default_shape(dynamic: dict[str, dict[str, int]]) -> None:
    for name, (shared_bytes, _) in DEVICES.items():
        assert dynamic[name]["hopfield_forward"] > 0 and max(dynamic[name].values()) <= shared_bytes
