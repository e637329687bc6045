"""Builds of the harness, and processes in which its operators stand in place of the CPU's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .build import ROOT, build, operator_sources


def run_python(library: Path, *arguments: str, settings: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python where the library's operators can be loaded with :mod:`tests.cuda_on_host.plugin`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"AIT_CUDA_ON_HOST_LIBRARY": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if settings is not None:
        environment["AIT_CUDA_ON_HOST"] = settings
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def library() -> Path:
    """All CUDA operators, built for the host."""
    return build(operator_sources())


@pytest.fixture
def broken_library(tmp_path: Path) -> Callable[[str, dict[str, tuple[str, str]]], Path]:
    """Builds an operator from sources in which some words were replaced: ``{file: (right, wrong)}``."""

    def make(operator: str, slips: dict[str, tuple[str, str]]) -> Path:
        csrc = tmp_path / "csrc"
        for name in ("cuda", "common"):
            shutil.copytree(ROOT / "csrc" / name, csrc / name)
        for file, (right, wrong) in slips.items():
            path = csrc / "cuda" / file
            text = path.read_text()
            assert text.count(right) == 1, f"{file} has changed: choose another slip than that of {right!r}"
            path.write_text(text.replace(right, wrong))
        return build([csrc / "cuda" / f"{operator}.cu"], csrc, "-O0")

    return make
