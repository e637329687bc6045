"""What every test starts from, and the distribution files that several kinds of test install."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

# Several workers share the processor: threads of small operations would wait for each other, and take most of the time.
# Tests that are about threads choose their number themselves.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draws the same numbers in a test alone, in any order and in any worker."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dist_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from that sdist; built once, whichever worker of pytest-xdist asks first."""
    from filelock import FileLock

    from tests.distributions import build_distributions

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributions"
    with FileLock(f"{shared}.lock"):
        built = shared / "source" / "dist"
        if not list(built.glob("*.whl")):
            shutil.rmtree(shared, ignore_errors=True)
            build_distributions(shared)
    return built


@pytest.fixture(scope="session")
def wheel(dist_dir: Path) -> Path:
    (path,) = dist_dir.glob("*.whl")
    return path
