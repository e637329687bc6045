"""What the packaging tests share: a copy of the sources, and empty environments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributions import Environment, copy_sources


@pytest.fixture(autouse=True, scope="session")
def _no_cuda_unless_asked() -> Iterator[None]:
    """Compiling CUDA kernels takes minutes: packages are built without them where a test does not ask for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIT_CUDA", "0")
        yield


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    return copy_sources(tmp_path / "source")


@pytest.fixture
def make_environment(tmp_path: Path) -> Callable[[], Environment]:
    return lambda: Environment(tmp_path / "environment")
