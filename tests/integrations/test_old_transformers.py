"""Older layouts of transformers, on real older releases: their own environments run the tests.

``AIT_OLD_TRANSFORMERS_PYTHON`` names interpreters, separated as in PATH, whose environments have an older
transformers, and torch, pytest and safetensors; none are made here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

VARIABLE = "AIT_OLD_TRANSFORMERS_PYTHON"
ROOT = Path(__file__).parents[2]
FILES = ("tests/integrations/older_transformers.py", "tests/integrations/test_pretrained.py")


@pytest.mark.slow
@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no environment with an older transformers")
def test_in_environments_with_older_releases() -> None:
    for python in os.environ[VARIABLE].split(os.pathsep):
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
        assert done.returncode == 0, f"{python}\n{done.stdout[-5000:]}\n{done.stderr[-2000:]}"
