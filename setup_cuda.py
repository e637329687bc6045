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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# Below it a block has no more than 64 KiB of shared memory (7.0: 96 KiB), and selection asks for some more.
OLDEST = (8, 0)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that fits the torch of this build."""

    nvcc: Path
    include_dirs: tuple[Path, ...]
    runtime: Path  # libcudart.so, under whichever name it has
    version: str  # "13.0"
    refused: tuple[str, ...] = ()  # places that were tried before, and why they were not taken


@dataclass(frozen=True)
class Architectures:
    """Compute capabilities to compile for, such as ``("8.0", "9.0+PTX")``."""

    names: tuple[str, ...]
    remark: str = ""  # which of this machine's GPUs they leave out, and why


def asks_for_cuda() -> bool | None:
    """What ``AIT_CUDA`` says: yes, no, or None for "where it is possible"."""
    asked = os.environ.get("AIT_CUDA") or None
    if asked not in (None, "0", "1"):
        raise SystemExit(f"AIT_CUDA: expected 0 or 1, got {asked!r}")
    return None if asked is None else asked == "1"


def find_toolkit() -> Toolkit | str:
    """The first toolkit that fits torch, or why there is none."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    wheels = _wheel_roots(torch.version.cuda)
    roots = [*_candidate_roots(torch.version.cuda), *wheels]
    compilers = [root / "bin" / "nvcc" for root in roots if (root / "bin" / "nvcc").exists()]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        compilers.append(Path(on_path))
    if not compilers:
        return "no CUDA toolkit found: no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"
    refused: list[str] = []
    for root in roots:
        found = _toolkit_in(root, compilers, wheels)
        if isinstance(found, Toolkit):
            return replace(found, refused=tuple(refused))
        refused.append(f"{root} ({found})")
    return f"no CUDA toolkit found for torch {torch.__version__}: {'; '.join(refused) or 'no folder to look in'}"


def _toolkit_in(root: Path, compilers: list[Path], wheels: list[Path]) -> Toolkit | str:
    """The toolkit in a folder, or what is wrong with it."""
    import torch

    # A root is believed only if it holds what a toolkit holds: an nvcc on the PATH may be a wrapper from elsewhere.
    if not (root / "include" / "cuda_runtime.h").exists():
        return "no include/cuda_runtime.h"
    runtime = _runtime_library(root)
    if runtime is None:
        return "no libcudart"
    own = root / "bin" / "nvcc"
    wrong = []
    # The wheels that torch came with need not hold a compiler: that of another root serves them.
    for nvcc in [own] if own.exists() else dict.fromkeys(compilers):
        version = _nvcc_version(nvcc)
        if version is None:
            wrong.append(f"{nvcc} --version says no version")
        elif version.split(".")[0] != str(torch.version.cuda).split(".")[0]:
            wrong.append(f"nvcc {version} in {nvcc.parent}, but torch is built for CUDA {torch.version.cuda}")
        else:
            # Headers of those wheels stand in for what a small toolkit leaves out.
            includes = [folder / "include" for folder in (root, *wheels) if (folder / "include").is_dir()]
            return Toolkit(nvcc, tuple(dict.fromkeys(includes)), runtime, version)
    return ", ".join(wrong)


def _candidate_roots(torch_cuda: str) -> list[Path]:
    """Where toolkits are installed."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        roots.append(Path(on_path).resolve().parent.parent)
    roots += [Path("/usr/local/cuda"), Path(f"/usr/local/cuda-{torch_cuda}")]
    return [root for root in dict.fromkeys(roots) if root.is_dir()]


def _wheel_roots(torch_cuda: str) -> list[Path]:
    """The folders of the wheels that torch came with."""
    import torch

    wheels = Path(torch.__file__).resolve().parent.parent / "nvidia"
    roots = [wheels / f"cu{torch_cuda.split('.')[0]}", wheels / "cuda_runtime"]
    return [root for root in roots if root.is_dir()]


def _runtime_library(root: Path) -> Path | None:
    found = [path for folder in ("lib64", "lib") for path in sorted((root / folder).glob("libcudart.so*"))]
    return found[0] if found else None


def _nvcc_version(nvcc: Path) -> str | None:
    try:
        result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    except OSError:  # not executable, or for another machine
        return None
    match = re.search(r"release (\d+\.\d+)", result.stdout)
    return match.group(1) if match else None


def architectures(nvcc: Path | None = None) -> Architectures:
    """What to compile for.

    The capabilities in ``TORCH_CUDA_ARCH_LIST``; without it those of the GPUs of this machine; without any that the
    kernels run on and ``nvcc`` compiles for a default list, of which an older ``nvcc`` compiles what it knows.
    """
    known = [] if nvcc is None else _listed_capabilities(nvcc)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return Architectures(tuple(_asked_architectures(asked, known)))
    import torch

    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not torch.cuda.is_available() or not seen:
        return Architectures(_default_architectures(known))
    chosen, too_old = [], []
    for capability in sorted(seen):
        older = [other for other in known if OLDEST <= other < capability]
        if capability >= OLDEST and (not known or capability in known):
            chosen.append(_name(capability))
        elif older:  # a GPU that this nvcc does not know yet: its driver compiles the PTX of the newest that it does
            chosen.append(f"{_name(max(older))}+PTX")
        else:
            too_old.append(_name(capability))
    remark = (
        f"none for this machine's GPUs of capability {', '.join(too_old)}, too old: "
        f"the kernels need {_name(OLDEST)} or newer, and an nvcc that compiles for it"
    )
    names = tuple(name for name in dict.fromkeys(chosen) if f"{name}+PTX" not in chosen)
    return Architectures(names or _default_architectures(known), remark if too_old else "")


def _asked_architectures(asked: str, known: list[tuple[int, int]]) -> list[str]:
    chosen = [name for name in re.split(r"[;,\s]+", asked) if name]
    wrong = [name for name in chosen if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]
    if wrong or not chosen:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.0;9.0+PTX, got {asked!r} "
            "(ait's CUDA kernels; AIT_CUDA=0 leaves them out)"
        )
    names = {_name(capability) for capability in known}
    unknown = [name for name in chosen if known and re.sub(r"[af]?(\+PTX)?$", "", name) not in names]
    if unknown:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: expected what nvcc compiles for ({', '.join(map(_name, known))}), "
            f"got {', '.join(unknown)} (ait's CUDA kernels; AIT_CUDA=0 leaves them out)"
        )
    return chosen


def _listed_capabilities(nvcc: Path) -> list[tuple[int, int]]:
    """What ``nvcc`` says that it compiles for; nothing where it does not say."""
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True).stdout
    return sorted((int(major), int(minor)) for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed))


def _name(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _default_architectures(known: list[tuple[int, int]]) -> tuple[str, ...]:
    """Those of the default list that ``nvcc`` knows, PTX of the newest; all of them where it lists none."""
    names = DEFAULT_ARCHITECTURES.split(";")
    compiled = [name.removesuffix("+PTX") for name in names]
    compiled = [name for name in compiled if name in map(_name, known)]
    return (*compiled[:-1], f"{compiled[-1]}+PTX") if compiled else tuple(names)


def architecture_flags(chosen: Iterable[str]) -> list[str]:
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
