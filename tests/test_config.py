"""``ait.show_config``, and the examples that the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ait
from ait.ops._library import SCHEMAS, is_pure_python

ROOT = Path(__file__).resolve().parents[1]


def test_show_config_prints_versions_kernels_and_why_there_is_no_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert ait.show_config() is None
    printed = capsys.readouterr().out
    assert re.search(rf"^ait: +{re.escape(ait.__version__)}$", printed, re.MULTILINE)
    assert re.search(rf"running: +{re.escape(torch.__version__)}$", printed, re.MULTILINE)
    assert re.search(r"^cuda: +no: \w+", printed, re.MULTILINE)
    expected = "reference" if is_pure_python() else "C\\+\\+ on cpu(?: and cuda)?, reference elsewhere"
    for name in set(SCHEMAS) - {"memory_snapshot"}:
        assert re.search(rf"{name}: +{expected}$", printed, re.MULTILINE)


def test_show_config_returns_the_same_as_dictionaries() -> None:
    config = ait.show_config("dicts")
    assert config is not None
    assert config["ait"] == ait.__version__
    assert config["threads"] == torch.get_num_threads()


def test_show_config_refuses_another_mode() -> None:
    with pytest.raises(ValueError, match="expected mode 'stdout' or 'dicts', got 'json'"):
        ait.show_config("json")  # type: ignore[arg-type]


@pytest.mark.skipif(is_pure_python(), reason="needs the compiled kernels")
@pytest.mark.parametrize(("setting", "expected"), [("default", "baseline"), ("avx2", "avx2")])
def test_instruction_set_follows_the_environment_and_is_told(setting: str, expected: str) -> None:
    built = (ait.show_config("dicts") or {})["instruction set"]
    if expected not in built or (expected == "avx2" and built.startswith("baseline")):
        pytest.skip(f"this machine or build has no {expected}: {built}")
    script = "import ait; print(ait.show_config('dicts')['instruction set'])"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": setting}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.stdout.startswith(f"{expected} "), result.stderr
