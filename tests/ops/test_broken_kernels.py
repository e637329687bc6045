"""The tests of the operators notice a wrong kernel: sources with one slip in each operator are built and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.common import ROOT, needs_kernels

# Operator: (file, what it says, what it should better not say, which tests are to fail).
SLIPS = {
    "bottleneck_select": (
        "bottleneck_select_keys.h",
        "in_ties ? k - above_high : n",
        "in_ties ? k : n",
        "first_are_kept",
    ),
    "bottleneck_attend": (
        "bottleneck_attend_kernel.cpp",
        "C sum = a.part_sum[part] * scale;",
        "C sum = a.part_sum[part];",
        "match_the_reference",
    ),
    "hopfield_retrieve": (
        "hopfield_retrieve_tile.h",
        "m < whole + V::size; ++m) weights[m] = -INFINITY;",
        "m < whole + V::size; ++m) weights[m] = 0;",
        "reference and not compiled",
    ),
}


def run(command: list[str], directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(directory), **variables}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def broken_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with all the slips, built for the instruction set in use, beside its tests."""
    from ait import _C

    target = tmp_path_factory.mktemp("broken")
    for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target / name)
    for name in ("ait", "csrc", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for file, right, wrong, _ in SLIPS.values():
        path = target / "csrc" / "cpu" / file
        text = path.read_text()
        assert text.count(right) == 1, f"{path.name} has changed: choose another slip than that of {right!r}"
        path.write_text(text.replace(right, wrong))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = run(command, target, AIT_BUILD_CAPABILITIES=_C.cpu_capability(), AIT_CUDA="0")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return target


@needs_kernels
@pytest.mark.slow
@pytest.mark.xdist_group("broken_kernels")
@pytest.mark.parametrize("operator", SLIPS)
def test_a_wrong_kernel_fails_its_tests(operator: str, broken_package: Path) -> None:
    where = run([sys.executable, "-c", "import ait; print(ait.__file__)"], broken_package)
    assert Path(where.stdout.strip()).is_relative_to(broken_package), where.stdout + where.stderr
    pytest_options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-k", SLIPS[operator][3]]
    command = [sys.executable, "-m", "pytest", *pytest_options, f"tests/ops/test_{operator}.py"]
    result = run(command, broken_package)
    # Code 1 is "tests were run and some failed": not an import error, not a crash, not an empty selection.
    assert result.returncode == 1, result.stdout[-4000:] + result.stderr[-4000:]
    assert re.search(r"\d+ failed", result.stdout), result.stdout[-4000:]
    assert "error" not in result.stdout.splitlines()[-1], result.stdout[-4000:]
