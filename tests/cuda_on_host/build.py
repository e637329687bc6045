"""Builds the CUDA operators for the host: ``csrc/cuda`` with the C++ compiler and this folder's headers."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD_DIR = ROOT / "build" / "cuda_on_host"
# Contraction off, as in the CPU kernels; CUDA's pragmas are unknown to the C++ compiler.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# AddressSanitizer and UndefinedBehaviorSanitizer: what goes wrong within a thread's own arrays, of which the harness
# has no record. A library so built wants sanitizer_libraries() loaded first.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g1"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def sanitizer_libraries() -> list[Path]:
    """AddressSanitizer's library, and that of the exceptions which it watches; empty where the compiler has none."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        result = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        paths.append(Path(result.stdout.strip()))
    return paths if all(path.is_absolute() and path.exists() for path in paths) else []


def include_flags(csrc: Path) -> list[str]:
    """This folder's headers before those of the same names for CUDA."""
    torch_include = Path(torch.__file__).parent / "include"
    return [f"-I{HERE / 'include'}", f"-I{csrc}", f"-isystem{torch_include}"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def _compile(source: Path, csrc: Path, flags: list[str]) -> Path:
    """The object of a source, compiled anew only when what it is made from has changed."""
    command = [compiler(), *FLAGS, *flags, *STABLE_ABI, *include_flags(csrc), "-x", "c++", "-c", str(source)]
    headers = [*HERE.glob("*.h"), *(HERE / "include" / "cuda").glob("*.h")]
    headers += [*(csrc / "cuda").glob("*.h"), *(csrc / "common").glob("*.h")]
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in sorted([source, *headers]):
        digest.update(path.read_bytes())
    target = BUILD_DIR / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        _run([*command, "-o", str(scratch)])
        scratch.replace(target)
    return target


def build(
    sources: list[Path], csrc: Path = ROOT / "csrc", optimise: str = "-O2", sanitizers: Sequence[str] = ()
) -> Path:
    """A library of these sources and the harness; loading it puts its operators in place of the CPU's."""
    with ThreadPoolExecutor(2) as pool:
        everything = [*sources, HERE / "runtime.cpp", HERE / "settings.cpp"]
        objects = list(
            pool.map(
                lambda source: _compile(source, csrc, [optimise if source in sources else "-O2", *sanitizers]),
                everything,
            )
        )
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    target = BUILD_DIR / f"libcuda_on_host-{digest}.so"
    if not target.exists():
        scratch = target.with_suffix(f".{os.getpid()}")
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        _run([compiler(), "-shared", *sanitizers, *map(str, objects), *libraries, "-o", str(scratch)])
        scratch.replace(target)
    return target


def operator_sources(csrc: Path = ROOT / "csrc") -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))
