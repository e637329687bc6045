"""Older layouts of transformers, on real older releases: each in an environment of its own, made here.

All that is not transformers (torch, timm, pytest) comes from the environment in which the tests run.
``AIT_OLD_TRANSFORMERS=all`` runs every release of the table, otherwise the first one alone runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("tests/integrations/older_transformers.py", "tests/integrations/test_pretrained.py")
# Of each release, the other packages that it does not take as new as they are. All three have encoder.layer[i] with
# intermediate and output; around these, attention is a class, one of two classes (SDPA), or looked up in a table.
RELEASES = {
    "4.40.2": ("tokenizers==0.19.1", "huggingface_hub==0.24.7"),
    "4.48.3": ("tokenizers==0.21.0", "huggingface_hub==0.27.1"),
    "4.57.3": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
}
OLDEST = next(iter(RELEASES))
EVERY = os.environ.get("AIT_OLD_TRANSFORMERS") == "all"


def make_environment(folder: Path, *packages: str) -> Path:
    """An environment with ``packages`` in front of those of this one; its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # Before the others can be seen: pip would take them for its own.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *packages]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    own = {"base": str(folder), "platbase": str(folder)}
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(sysconfig.get_path("purelib", vars=own), "zz_others.pth").write_text("\n".join(ours))
    return python


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_insertion_and_files_on_an_older_release(release: str, tmp_path: Path) -> None:
    if release != OLDEST and not EVERY:
        pytest.skip("AIT_OLD_TRANSFORMERS=all runs it")
    python = make_environment(tmp_path / "environment", f"transformers=={release}", *RELEASES[release])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import transformers; print(transformers.__version__)"
    version = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert version.stdout.strip() == release, "the environment has another release, so the test shows nothing"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
