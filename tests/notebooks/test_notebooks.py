"""The notebooks run as a reader would run them, and are committed as they ran."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributions import ROOT, Environment
from tests.notebooks import no_network
from tests.notebooks.conftest import Outside

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# For what hangs, and no measure of speed: a notebook takes less than 90 on two quiet cores (notebooks/execute.py says
# where one does not), and a machine that runs other tests can be several times as slow.
CELL_SECONDS = 600
WHOLE_SECONDS = 900
MOST_BYTES = 1_000_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def outputs(path: Path) -> Iterator[dict[str, Any]]:
    for cell in cells(path, "code"):
        yield from cell["outputs"]


def text_of(output: dict[str, Any]) -> str:
    """What an output shows in words."""
    parts = [output.get("text", ""), output.get("data", {}).get("text/plain", ""), *output.get("traceback", [])]
    return "\n".join("".join(part) for part in parts)


def complaints(path: Path) -> list[str]:
    """Errors and warnings among the outputs."""
    return [
        text_of(output)
        for output in outputs(path)
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]


def run_within(seconds: float, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command; past its time it is asked to end, which also ends the kernel that it started, and then killed.

    Raises:
        TimeoutError: it took longer.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes, **options) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            raise TimeoutError(f"more than {seconds} seconds: {' '.join(command[-1:])}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def execute(
    path: Path, environment: Environment, outside: Outside, empty: Path, seconds: float = WHOLE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Runs a copy of the notebook in the folder ``empty`` and keeps its outputs there."""
    folder, home = empty / "here", empty / "home"
    folder.mkdir(parents=True)
    home.mkdir()
    shutil.copy(path, folder)
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "TMPDIR") if key in os.environ}
    # With a home of its own, neither kernels nor settings nor caches of the user's are found.
    variables = {
        **kept,
        "HOME": str(home),
        "JUPYTER_PLATFORM_DIRS": "1",
        "MPLCONFIGDIR": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    options = ["--nbmake", "--overwrite", f"--nbmake-timeout={CELL_SECONDS}", "-p", "no:cacheprovider", "-q"]
    command = [*outside.command, str(environment.python), "-m", "pytest", *options, path.name]
    return run_within(seconds, command, cwd=folder, env=variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.xdist_group(path.stem)) for path in NOTEBOOKS], ids=lambda p: p.stem
)
def test_notebook_runs_in_an_empty_folder_on_the_installed_wheel_without_a_network_or_a_warning(
    path: Path, environment: Environment, outside: Outside, tmp_path: Path
) -> None:
    pytest.importorskip("nbmake")
    result = execute(path, environment, outside, tmp_path / "empty")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "1 passed" in result.stdout
    assert not complaints(tmp_path / "empty" / "here" / path.name)


def write_notebook(path: Path, source: str) -> Path:
    nbformat = pytest.importorskip("nbformat")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    return path


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import urllib.request\nurllib.request.urlopen('http://192.0.2.1/')", no_network.MESSAGE),
        ("import ait, warnings\nwarnings.warn('ait: a warning')", "UserWarning: ait: a warning"),
    ],
    ids=["network", "warning"],
)
def test_a_notebook_that_asks_for_the_network_or_warns_is_found_out(
    source: str, complaint: str, environment: Environment, outside: Outside, tmp_path: Path
) -> None:
    pytest.importorskip("nbmake")
    path = write_notebook(tmp_path / "guilty.ipynb", source)
    execute(path, environment, outside, tmp_path / "empty")
    assert complaint in "".join(complaints(tmp_path / "empty" / "here" / path.name))


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes whose working folder it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve(strict=True) == folder:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # another user's, or it has ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
def test_a_notebook_that_hangs_is_ended_with_its_kernel(
    environment: Environment, outside: Outside, tmp_path: Path
) -> None:
    pytest.importorskip("nbmake")
    folder = tmp_path / "empty" / "here"
    path = write_notebook(
        tmp_path / "hangs.ipynb", "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(3600)"
    )
    with pytest.raises(TimeoutError, match=r"more than 20 seconds: hangs\.ipynb"):
        execute(path, environment, outside, tmp_path / "empty", seconds=20)
    assert (folder / "started").exists()
    until = time.monotonic() + 30
    while (left := processes_in(folder)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
def test_the_environment_has_the_wheel_alone(environment: Environment) -> None:
    result = environment.run_python(
        "import sys, ait\n"
        "print(ait.__file__)\n"
        f"assert not [path for path in sys.path if path.startswith({str(ROOT)!r}) and 'site-packages' not in path]\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(environment.site_packages))


def test_there_are_notebooks_and_the_list_names_them_all() -> None:
    assert NOTEBOOKS
    listed = set(re.findall(r"\(([^)/]+\.ipynb)\)", (FOLDER / "README.md").read_text()))
    assert listed == {path.name for path in NOTEBOOKS}


@each_notebook
def test_committed_notebook_was_run_from_top_to_bottom_without_an_error_or_a_warning(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not complaints(path)


@each_notebook
def test_committed_notebook_names_no_path_of_a_machine(path: Path) -> None:
    shown = [text_of(output) for output in outputs(path)]
    written = ["".join(cell["source"]) for kind in ("code", "markdown") for cell in cells(path, kind)]
    for text in (*shown, *written, json.dumps(json.loads(path.read_text())["metadata"])):
        assert not re.search(r"(?<![\w/.:])/(home|work|tmp|root|usr|opt|mnt|Users|var)/", text), text[:2000]


@each_notebook
def test_committed_notebook_is_small(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES


@each_notebook
def test_committed_notebook_shows_figures_that_are_drawn(path: Path) -> None:
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("matplotlib.image")
    figures = [output["data"]["image/png"] for output in outputs(path) if "image/png" in output.get("data", {})]
    assert figures
    for figure in figures:
        pixels = image.imread(io.BytesIO(base64.b64decode("".join(figure))), format="png")
        assert min(pixels.shape[:2]) >= 100
        assert len(np.unique(pixels[..., :3].sum(-1))) > 10
