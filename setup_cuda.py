"""What ``setup.py`` needs to know about CUDA: toolkit, architectures, and a compile step that tells of spills.

As a program, ``setup_cuda.py RECORD NVCC ARGUMENTS...`` compiles one file, writes the registers and the shared memory
of its kernels to RECORD (JSON), and warns where ptxas spills registers; a test of the build fails there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that fits the torch of this build."""

    nvcc: Path
    include_dirs: tuple[Path, ...]
    runtime: Path  # libcudart.so, under whichever name it has
    version: str  # "13.0"


def asks_for_cuda() -> bool | None:
    """What ``AIT_CUDA`` says: yes, no, or None for "where it is possible"."""
    asked = os.environ.get("AIT_CUDA") or None
    if asked not in (None, "0", "1"):
        raise SystemExit(f"AIT_CUDA: expected 0 or 1, got {asked!r}")
    return None if asked is None else asked == "1"


def find_toolkit() -> Toolkit | str:
    """The toolkit, or why there is none."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    roots = _candidate_roots(torch.version.cuda)
    nvccs = [root / "bin" / "nvcc" for root in roots if (root / "bin" / "nvcc").exists()]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        nvccs.append(Path(on_path))
    if not nvccs:
        return "no CUDA toolkit found: no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"
    # A root is believed only if it holds what a toolkit holds: an nvcc on the PATH may be a wrapper from elsewhere.
    complete = [root for root in roots if (root / "include" / "cuda_runtime.h").exists() and _runtime_library(root)]
    if not complete:
        return f"no CUDA toolkit found: none of {', '.join(map(str, roots))} has cuda_runtime.h and libcudart"
    root = complete[0]
    nvcc = root / "bin" / "nvcc" if (root / "bin" / "nvcc").exists() else nvccs[0]
    version = _nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} --version says no version"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {version} in {nvcc.parent}, but torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    runtime = _runtime_library(root)
    assert runtime is not None
    # Headers of the wheels that torch came with stand in for what a small toolkit leaves out.
    includes = [root / "include", *(r / "include" for r in complete[1:])]
    return Toolkit(nvcc, tuple(dict.fromkeys(includes)), runtime, version)


def _candidate_roots(torch_cuda: str) -> list[Path]:
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        roots.append(Path(on_path).resolve().parent.parent)
    roots += [Path("/usr/local/cuda"), Path(f"/usr/local/cuda-{torch_cuda}")]
    import torch

    wheels = Path(torch.__file__).resolve().parent.parent / "nvidia"
    roots += [wheels / f"cu{torch_cuda.split('.')[0]}", wheels / "cuda_runtime"]
    return [root for root in dict.fromkeys(roots) if root.is_dir()]


def _runtime_library(root: Path) -> Path | None:
    found = [path for folder in ("lib64", "lib") for path in sorted((root / folder).glob("libcudart.so*"))]
    return found[0] if found else None


def _nvcc_version(nvcc: Path) -> str | None:
    result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    match = re.search(r"release (\d+\.\d+)", result.stdout)
    return match.group(1) if match else None


def architectures(nvcc: Path | None = None) -> list[str]:
    """Compute capabilities to compile for, such as ``["8.0", "9.0+PTX"]``.

    Those in ``TORCH_CUDA_ARCH_LIST``; without it those of the GPUs of this machine; without any a default list,
    of which an older ``nvcc`` compiles what it knows.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:
        import torch

        if not torch.cuda.is_available():
            return _known_architectures(DEFAULT_ARCHITECTURES.split(";"), nvcc)
        seen = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
        return [f"{major}.{minor}" for major, minor in seen]
    chosen = [name for name in re.split(r"[;,\s]+", asked) if name]
    wrong = [name for name in chosen if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]
    if wrong or not chosen:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.0;9.0+PTX, got {asked!r} "
            "(ait's CUDA kernels; AIT_CUDA=0 leaves them out)"
        )
    return chosen


def _known_architectures(names: list[str], nvcc: Path | None) -> list[str]:
    """Those of ``names`` that ``nvcc`` lists, PTX of the newest; all of them where it lists none."""
    if nvcc is None:
        return names
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    bare = [name.removesuffix("+PTX") for name in names]
    known = [name for name in bare if f"compute_{name.replace('.', '')}" in listed]
    return [*known[:-1], f"{known[-1]}+PTX"] if known else names


def architecture_flags(chosen: list[str]) -> list[str]:
    """nvcc's ``-gencode`` for each architecture, and for the PTX of those that ask for it."""
    flags = []
    for name in chosen:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def parse_resource_usage(text: str) -> dict[str, dict[str, int]]:
    """Registers, static shared memory and spills of each kernel and architecture, from ptxas' report."""
    result: dict[str, dict[str, int]] = {}
    pattern = (
        r"Compiling entry function '([^']+)' for '([^']+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for match in re.finditer(pattern, text, re.DOTALL):
        kernel, architecture, stack, stores, loads, registers, rest = match.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        result[f"{kernel} {architecture}"] = {
            "registers": int(registers),
            "static_shared_bytes": int(shared.group(1)) if shared else 0,
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
        }
    return result


def compile_and_record(record: Path, command: list[str]) -> int:
    """Runs nvcc and records what its kernels use; returns its exit status, or 1 where it reported nothing."""
    process = subprocess.run(command, capture_output=True, text=True)
    usage = parse_resource_usage(process.stdout + process.stderr)
    noise = r"^(ptxas info .*|\s*\d+ bytes stack frame.*|\s*)$"
    remarks = [line for line in (process.stdout + process.stderr).splitlines() if not re.match(noise, line)]
    if remarks:
        print("\n".join(remarks), file=sys.stderr)
    if process.returncode != 0:
        return process.returncode
    if not usage:
        print(f"ait: {' '.join(command)}: expected a report of ptxas, got none", file=sys.stderr)
        return 1
    spilling = {kernel: use["spill_bytes"] for kernel, use in usage.items() if use["spill_bytes"]}
    for kernel, spilled in spilling.items():
        print(f"ait: warning: {kernel} spills {spilled} bytes of registers: it runs, but slower", file=sys.stderr)
    record.write_text(json.dumps(usage, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(compile_and_record(Path(sys.argv[1]), sys.argv[2:]))
