"""Builds of the harness, and processes in which its operators stand in place of the CPU's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

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


class Case(NamedTuple):
    """A program, run where the operators of a library stand in place of the CPU's."""

    library: Path
    program: str
    variables: Mapping[str, str] = MappingProxyType({})


class Ending(NamedTuple):
    """How a program ended, and what it printed."""

    status: int
    output: str


# Importing torch takes longer than most programs: each of them runs in a fork of one process that has done so.
RUN_CASES = """
import json, os, sys, traceback
import torch, ait, ait.ops._first_use, tests.ops.test_bottleneck_attend
endings = []
for library, program, variables in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1), os.dup2(write, 2)
        os.environ.update(variables, AIT_CUDA_ON_HOST_LIBRARY=library)
        status = 0
        try:
            import tests.cuda_on_host.plugin
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    os.close(write)
    with os.fdopen(read, errors="replace") as output:
        text = output.read()
    endings.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
print(json.dumps(endings))
"""


def run_cases(cases: list[Case]) -> list[Ending]:
    """Runs each program in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    given = json.dumps([(str(case.library), case.program, dict(case.variables)) for case in cases])
    command = [sys.executable, "-c", RUN_CASES]
    result = subprocess.run(command, cwd=ROOT, env=environment, input=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [Ending(*ending) for ending in json.loads(result.stdout.splitlines()[-1])]


def build_broken(
    folder: Path, operator: str, file: str, right: str, wrong: str, sanitizers: Sequence[str] = ()
) -> Path:
    """Builds an operator from sources in ``folder`` in which some words of a file are replaced."""
    csrc = folder / "csrc"
    for name in ("cuda", "common"):
        shutil.copytree(ROOT / "csrc" / name, csrc / name)
    path = csrc / "cuda" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{file} has changed: choose another slip than that of {right!r}"
    path.write_text(text.replace(right, wrong))
    return build([csrc / "cuda" / f"{operator}.cu"], csrc, "-O0", sanitizers)
