"""Builds the kernel libraries ``ait/libait_cpu.so`` and, where a CUDA toolkit is, ``ait/libait_cuda.so``, and the
module ``ait._C``; metadata is in pyproject.toml.

Environment variables:
  AIT_PURE_PYTHON=1       build nothing: the reference operators, in plain PyTorch, run instead
  AIT_CUDA=1 | 0          1: fail where no CUDA kernels can be built; 0: do not look for them
  TORCH_CUDA_ARCH_LIST    compute capabilities to build CUDA kernels for (default: those of this machine's GPUs that
                          are of 8.0 or newer and that nvcc knows, else a list)
  AIT_BUILD_CAPABILITIES  comma-separated subset of baseline,avx2,avx512,avx512_bf16,amx_bf16 (default: all that fit
                          the architecture); the last two add products of bfloat16 to avx512
  CXX, MAX_JOBS           compiler; number of parallel compile jobs
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import setup_cuda  # noqa: E402

PURE_PYTHON = os.environ.get("AIT_PURE_PYTHON") == "1"
KERNEL_LIBRARY = "ait.libait_cpu"
CUDA_LIBRARY = "ait.libait_cuda"
MODULE = "ait._C"

# torch 2.10 is the first release whose stable ABI has all that the operators use; a library built for that
# target runs under every later torch too.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# Contraction off: a multiply-add is fused only where the code says so, or results would differ between variants.
CXX_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off -Wall -Wextra"
CUDA_FLAGS = (
    "-O3 -std=c++20 --resource-usage -Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall -DUSE_CUDA"
)
CAPABILITY_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
CAPABILITY_FLAGS["avx512_bf16"] = CAPABILITY_FLAGS["avx512"] + " -mavx512bf16"
CAPABILITY_FLAGS["amx_bf16"] = CAPABILITY_FLAGS["avx512_bf16"] + " -mamx-tile -mamx-bf16"


def kernel_capabilities(stem: str, capabilities: list[str]) -> list[str]:
    """The instruction sets for which a kernel source is compiled: those named ``*_bf16_kernel`` for one alone."""
    return [name for name in capabilities if name.endswith("_bf16") == stem.endswith("_bf16_kernel")]


def build_capabilities() -> list[str]:
    """The instruction sets that kernels are compiled for."""
    fitting = list(CAPABILITY_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    asked = os.environ.get("AIT_BUILD_CAPABILITIES")
    if asked is None:
        return fitting
    chosen = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in fitting]
    if unknown or not chosen:
        raise SystemExit(f"AIT_BUILD_CAPABILITIES: expected some of {','.join(fitting)}, got {asked!r}")
    return chosen


@functools.cache
def cuda_toolkit() -> setup_cuda.Toolkit | str:
    """The toolkit of the CUDA kernels, or why there are none; an error where ``AIT_CUDA=1`` asks for them."""
    asked = setup_cuda.asks_for_cuda()
    if asked is False:
        return "AIT_CUDA=0"
    found = "AIT_PURE_PYTHON=1" if PURE_PYTHON else setup_cuda.find_toolkit()
    if asked and isinstance(found, str):
        raise SystemExit(f"AIT_CUDA=1 asks for CUDA kernels, which cannot be built: {found}")
    return found


def cuda_status() -> str:
    """What was built for CUDA, or why nothing was."""
    toolkit = cuda_toolkit()
    if isinstance(toolkit, str):
        return f"not built: {toolkit}"
    chosen = setup_cuda.architectures(toolkit.nvcc)
    remark = f"; {chosen.remark}" if chosen.remark else ""
    return f"built with nvcc {toolkit.version} for {', '.join(chosen.names)}{remark}"


def write_build_info(package_dir: Path) -> None:
    """Records for ``ait.show_config()`` what was built, how, and against what."""
    if PURE_PYTHON:
        info: dict[str, object] = {"pure_python": True, "torch": None, "compiler": None, "capabilities": []}
    else:
        import torch

        info = {
            "pure_python": False,
            "torch": torch.__version__,
            "compiler": compiler_version(find_compiler()),
            "capabilities": build_capabilities(),
        }
    toolkit = cuda_toolkit()
    info["cuda"] = cuda_status()
    info["cuda_version"] = None if isinstance(toolkit, str) else toolkit.version
    header = '"""Written by setup.py when the package was built."""\n\nfrom typing import Any\n\n'
    lines = [f"    {key!r}: {value!r},\n" for key, value in info.items()]
    text = header + "BUILD_INFO: dict[str, Any] = {\n" + "".join(lines) + "}\n"
    path = package_dir / "_build_info.py"
    package_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def find_compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"ait: no C++ compiler: '{command[0]}' is not on the PATH. Install one (g++ 11 or clang 14, or newer), "
            "name it in CXX, or set AIT_PURE_PYTHON=1 for the slower reference operators."
        )
    return command


def compiler_version(command: list[str]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


class NinjaFile:
    """Collects build statements; ``str()`` gives the ninja file."""

    def __init__(self, compiler: list[str]) -> None:
        cxx = shlex.join(compiler)
        self.lines = [
            "ninja_required_version = 1.3",
            "rule compile",
            f"  command = {cxx} -MMD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared $in $flags -o $out",
        ]

    def add_cuda_rule(self, toolkit: setup_cuda.Toolkit) -> None:
        compiler = shlex.join([sys.executable, str(ROOT / "setup_cuda.py")])
        self.lines += [
            "rule compile_cuda",
            f"  command = {compiler} $out.json {shlex.quote(str(toolkit.nvcc))} "
            f"-MMD -MF $out.d {CUDA_FLAGS} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    @staticmethod
    def escape(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def add(self, rule: str, output: Path, inputs: list[Path], flags: list[str], after: Path | None = None) -> Path:
        implicit = f" | {self.escape(after)}" if after else ""
        self.lines.append(f"build {self.escape(output)}: {rule} {' '.join(map(self.escape, inputs))}{implicit}")
        self.lines.append("  flags = " + " ".join(shlex.quote(flag) for flag in flags).replace("$", "$$"))
        return output

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def write_ninja_file(build_dir: Path) -> dict[str, Path]:
    """Writes ``build.ninja``; returns the shared library of each extension."""
    import pybind11
    import torch

    csrc, compiler = ROOT / "csrc", find_compiler()
    python_include = Path(sysconfig.get_paths()["include"])
    if not (python_include / "Python.h").exists():
        raise SystemExit(f"ait: no Python.h in {python_include}: install the headers of this Python (python3-dev)")
    ninja = NinjaFile(compiler)
    common = [f"-I{csrc}"]
    torch_dir = Path(torch.__file__).parent
    torch_flags = [*common, *STABLE_ABI, f"-isystem{torch_dir / 'include'}"]

    capabilities = build_capabilities()
    enabled = [f"-DAIT_BUILD_{name.upper()}=1" for name in capabilities]
    objects = []
    for source in [
        csrc / "schemas.cpp",
        *sorted((csrc / "common").glob("*.cpp")),
        *sorted((csrc / "cpu").glob("*.cpp")),
    ]:
        stem = source.relative_to(csrc).with_suffix("")
        if not stem.name.endswith("_kernel"):
            objects.append(ninja.add("compile", build_dir / f"{stem}.o", [source], [*torch_flags, *enabled]))
            continue
        for name in kernel_capabilities(stem.name, capabilities):
            flags = [*common, f"-DAIT_CAPABILITY={name}", *shlex.split(CAPABILITY_FLAGS[name])]
            objects.append(ninja.add("compile", build_dir / f"{stem}.{name}.o", [source], flags))

    libraries = {}
    toolkit = cuda_toolkit()
    if not isinstance(toolkit, str):
        libraries[CUDA_LIBRARY] = add_cuda_library(ninja, toolkit, build_dir)

    kernel_library = build_dir / "libait_cpu.so"
    torch_libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    exports = f"-Wl,--version-script={csrc / 'exports.map'}"
    link_flags = ["-Wl,-soname,libait_cpu.so", "-Wl,--no-undefined", exports, *torch_libraries]
    ninja.add("link", kernel_library, objects, link_flags)

    module_flags = [*common, f"-isystem{pybind11.get_include()}", f"-isystem{python_include}"]
    module_object = ninja.add("compile", build_dir / "module.o", [csrc / "module.cpp"], module_flags)
    module = build_dir / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module_libraries = [f"-L{build_dir}", "-lait_cpu", "-Wl,-rpath,$ORIGIN"]
    ninja.add("link", module, [module_object], module_libraries, after=kernel_library)

    text = str(ninja)
    build_dir.mkdir(parents=True, exist_ok=True)
    path = build_dir / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    refused = () if isinstance(toolkit, str) else toolkit.refused
    passed_over = f" (passed over: {'; '.join(refused)})" if refused else ""
    built = f"{', '.join(capabilities)}; CUDA {cuda_status()}{passed_over}"
    print(f"ait: building against torch {torch.__version__} for {built}")
    return {**libraries, KERNEL_LIBRARY: kernel_library, MODULE: module}


def add_cuda_library(ninja: NinjaFile, toolkit: setup_cuda.Toolkit, build_dir: Path) -> Path:
    """Adds ``libait_cuda.so``, which is loaded beside ``libait_cpu.so``: that one defines the schemas."""
    import torch

    csrc, torch_dir = ROOT / "csrc", Path(torch.__file__).parent
    chosen = setup_cuda.architectures(toolkit.nvcc).names
    includes = [f"-isystem={path}" for path in (torch_dir / "include", *toolkit.include_dirs)]
    names = ", ".join(name.replace("+PTX", " or newer") for name in chosen)
    flags = [f"-I{csrc}", *STABLE_ABI, *includes, *setup_cuda.architecture_flags(chosen)]
    flags.append(f'-DAIT_CUDA_ARCHITECTURES="{names}"')
    ninja.add_cuda_rule(toolkit)
    objects = [
        ninja.add("compile_cuda", build_dir / "cuda" / f"{source.stem}.o", [source], flags)
        for source in sorted((csrc / "cuda").glob("*.cu"))
    ]
    libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", str(toolkit.runtime)]
    exports = f"-Wl,--version-script={csrc / 'exports.map'}"
    link_flags = ["-Wl,-soname,libait_cuda.so", "-Wl,--no-undefined", exports, *libraries]
    return ninja.add("link", build_dir / "libait_cuda.so", objects, link_flags)


class BuildExtensions(build_ext):
    """Runs ninja, then lays the libraries where setuptools wants them."""

    def get_ext_filename(self, fullname: str) -> str:
        # The kernel libraries are no Python modules, so their names carry no tag of a Python version.
        if fullname.endswith(("libait_cpu", "libait_cuda")):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        build_dir = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        libraries = write_ninja_file(build_dir)
        try:
            import ninja

            command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build_dir)]
        except ImportError:
            command = ["ninja", "-C", str(build_dir)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                "ait: compiling the kernels failed; the compiler's message is above. "
                "AIT_PURE_PYTHON=1 installs the slower reference operators instead, AIT_CUDA=0 leaves CUDA out."
            )
        for name, library in libraries.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            # A running process may have the old library mapped: the new one must be another file.
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def run(self) -> None:
        super().run()
        if self.inplace or self.editable_mode:
            write_build_info(ROOT / "ait")


class BuildPython(build_py):
    """Adds the record of the build to the package."""

    def run(self) -> None:
        super().run()
        write_build_info(ROOT / "ait" if self.editable_mode else Path(self.build_lib) / "ait")


def extension_names() -> list[str]:
    if PURE_PYTHON:
        return []
    # An isolated build asks for its requirements before torch is there.
    with_cuda = importlib.util.find_spec("torch") is not None and not isinstance(cuda_toolkit(), str)
    return [*([CUDA_LIBRARY] if with_cuda else []), KERNEL_LIBRARY, MODULE]


setup(
    ext_modules=[Extension(name, []) for name in extension_names()],
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
)
