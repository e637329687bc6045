"""Older layouts of transformers and timm, on real older releases: each in an environment of its own, made here.

All other packages (torch, pytest) come from the environment in which the tests run. The oldest release of each library
runs always, the others with ``AIT_OLDER_RELEASES=all``.
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
HERE = "tests/integrations"
FILES = {
    "transformers": (f"{HERE}/older_transformers.py", f"{HERE}/test_pretrained.py"),
    "timm": (f"{HERE}/test_timm_layers.py", f"{HERE}/test_timm_models.py", f"{HERE}/test_timm_hosts.py"),
}
# Of each release, the other packages that it does not take as new as they are. All of transformers' here have
# encoder.layer[i] with intermediate and output; around these, attention is a class, one of two classes (SDPA), or
# looked up in a table. 0.9.16 is the oldest timm that pyproject.toml allows.
RELEASES = {
    "transformers==4.40.2": ("tokenizers==0.19.1", "huggingface_hub==0.24.7"),
    "timm==0.9.16": (),
    "transformers==4.48.3": ("tokenizers==0.21.0", "huggingface_hub==0.27.1"),
    "transformers==4.57.3": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
    "timm==1.0.3": (),
    "timm==1.0.15": (),
}
OLDEST = tuple(RELEASES)[:2]
EVERY = os.environ.get("AIT_OLDER_RELEASES") == "all"


def make_environment(folder: Path, *packages: str) -> Path:
    """An environment with ``packages`` in front of those of this one; its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # Before the others can be seen: pip would take them for its own.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *packages]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    own = {"base": str(folder), "platbase": str(folder)}
    others = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(sysconfig.get_path("purelib", vars=own), "zz_others.pth").write_text("\n".join(others))
    return python


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_workspaces_on_an_older_release(release: str, tmp_path: Path) -> None:
    if release not in OLDEST and not EVERY:
        pytest.skip("AIT_OLDER_RELEASES=all runs it")
    library, _, number = release.partition("==")
    pytest.importorskip(library)
    python = make_environment(tmp_path / "environment", release, *RELEASES[release])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"import {library}; print({library}.__version__)"
    version = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert version.stdout.strip() == number, "the environment has another release, so the test shows nothing"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *FILES[library]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    assert library == "timm" or "skipped" not in done.stdout, done.stdout[-2000:]
