"""What ``notebooks/execute.py`` says of the time that a notebook took."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from tests.distributions import ROOT


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    pytest.importorskip("nbclient")
    specification = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("seconds", "used", "said"),
    [
        (89.9, 60.2, "a.ipynb: 90 s, 60 s of the processor"),
        (90.1, 60.2, "a.ipynb: 90 s, 60 s of the processor (more than 90)"),
        (50.0, 95.0, "a.ipynb: 50 s, 95 s of the processor (more than 90)"),
    ],
)
def test_more_than_ninety_seconds_of_either_kind_are_said(
    execute: ModuleType, seconds: float, used: float, said: str
) -> None:
    assert execute.describe("a.ipynb", seconds, used) == said


def test_seconds_of_the_processor_are_those_of_processes_that_were_started(execute: ModuleType) -> None:
    before = execute.processor_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert 0.5 <= execute.processor_seconds() - before < 5
