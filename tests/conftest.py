"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Draws the same numbers in a test alone, in any order and in any worker."""
    torch.manual_seed(0)
