"""What tests of the operators may ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ops.common import num_threads


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, for tests of many small operations: threads that wait for each other would take most of their time.

    Tests that are about threads choose their number themselves.
    """
    with num_threads(1):
        yield
