"""What the tests of the experiments share: small data, and threads that stay as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contact sheets that pass for CIFAR-10."""
    pytest.importorskip("PIL")
    from tests.experiments.tiny import write_tiny_cifar

    return write_tiny_cifar(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def threads() -> Iterator[None]:
    """Runs that set the number of threads set it for this test alone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
