"""Distribution files made from a copy of the sources, and empty environments to install them in."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "setup.py",
    "setup_cuda.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "Makefile",
)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def copy_sources(target: Path) -> Path:
    """Copies what an sdist is made from, without anything that was built."""
    target.mkdir(parents=True)
    for name in SOURCES:
        shutil.copy2(ROOT / name, target / name)
    for name in ("ait", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


def build_distributions(folder: Path) -> Path:
    """The sdist, and the wheel built from that sdist, as ``make dist`` makes them; in a folder that it returns.

    Compiling CUDA kernels takes minutes, so they are left out.
    """
    source = copy_sources(folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    result = run(command, cwd=source, env={**os.environ, "AIT_CUDA": "0"})
    assert result.returncode == 0, result.stdout + result.stderr
    return source / "dist"


class Environment:
    """A virtual environment that sees nothing of the one in which the tests run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        venv.create(path, with_pip=False)
        self.python = path / "bin" / "python"
        self.site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))

    def pip_install(self, *arguments: str) -> None:
        result = run([sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", *arguments])
        assert result.returncode == 0, result.stdout + result.stderr

    def link_distributions(self, *names: str) -> None:
        """Makes installed distributions, and all that they require, visible here without copying them."""
        pending, seen = list(names), set()
        while pending:
            distribution = importlib.metadata.distribution(pending.pop())
            name = distribution.metadata["Name"].lower()
            if name in seen:
                continue
            seen.add(name)
            pending += [
                requirement.name
                for requirement in map(Requirement, distribution.requires or [])
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            ]
            self._link_files(distribution)

    def _link_files(self, distribution: importlib.metadata.Distribution, *, prefix: tuple[str, ...] = ()) -> None:
        # Namespace packages (nvidia/...) are shared by several distributions: files are linked one by one there.
        for file in distribution.files or []:
            parts = file.parts
            if parts[0] in ("..", "__pycache__"):
                continue
            depth = 1 if parts[0] != "nvidia" else len(parts)
            target = self.site_packages.joinpath(*parts[:depth])
            source = Path(str(distribution.locate_file("/".join(parts[:depth]))))
            if source.exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)

    def run_python(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a script in an empty folder, with no compiler on the PATH."""
        empty = self.path / "empty"
        empty.mkdir(exist_ok=True)
        environment = {"PATH": str(empty), "HOME": os.environ.get("HOME", str(empty)), **variables}
        return run([str(self.python), "-c", script], cwd=empty, env=environment)
