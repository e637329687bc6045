"""The build of the CUDA kernels: which toolkit, which architectures, what is said, and what the library holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ait.ops import _library
from ait.ops._library import SCHEMAS, WITHOUT_CUDA_KERNELS, cuda_library_path, why_no_cuda_kernels
from tests.distributions import ROOT

sys.path.insert(0, str(ROOT))
import setup_cuda

pytestmark = pytest.mark.xdist_group("packaging")

CUDA_OBJECTS = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cuda"
needs_toolkit = pytest.mark.skipif(isinstance(setup_cuda.find_toolkit(), str), reason="needs a CUDA toolkit")
needs_cuda_build = pytest.mark.skipif(
    _library.is_pure_python() or why_no_cuda_kernels() is not None, reason="needs a build with CUDA kernels"
)


def build(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=source, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.fixture
def fake_root(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder that looks like a CUDA toolkit, with some of its files."""

    def make(*files: str, version: str = "13.0", name: str = "toolkit") -> Path:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        for file in files:
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
            path.chmod(0o755)
        return root

    return make


COMPLETE = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so")


@pytest.fixture
def only_root(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the search see some folders, and nothing on the PATH."""

    def choose(*roots: Path, wheels: tuple[Path, ...] = ()) -> None:
        monkeypatch.setattr(setup_cuda, "_candidate_roots", lambda torch_cuda: list(roots))
        monkeypatch.setattr(setup_cuda, "_wheel_roots", lambda torch_cuda: list(wheels))
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return choose


def test_a_complete_toolkit_is_found(fake_root: Callable[..., Path], only_root: Callable[..., None]) -> None:
    root = fake_root(*COMPLETE)
    only_root(root)
    expected = setup_cuda.Toolkit(root / "bin" / "nvcc", (root / "include",), root / "lib64" / "libcudart.so", "13.0")
    assert setup_cuda.find_toolkit() == expected


@pytest.mark.parametrize("missing", COMPLETE)
def test_a_root_without_compiler_headers_or_runtime_is_not_believed(
    missing: str, fake_root: Callable[..., Path], only_root: Callable[..., None]
) -> None:
    only_root(fake_root(*(name for name in COMPLETE if name != missing)))
    assert "no CUDA toolkit found" in str(setup_cuda.find_toolkit())


def test_another_major_version_than_that_of_torch_is_named(
    fake_root: Callable[..., Path], only_root: Callable[..., None]
) -> None:
    only_root(fake_root(*COMPLETE, version="12.8"))
    reason = setup_cuda.find_toolkit()
    assert isinstance(reason, str) and "nvcc 12.8" in reason and "built for CUDA 13.0" in reason


def test_the_search_goes_on_after_folders_that_do_not_fit_and_says_so(
    fake_root: Callable[..., Path], only_root: Callable[..., None]
) -> None:
    empty = fake_root("bin/nvcc", name="empty")
    older = fake_root(*COMPLETE, version="12.8", name="older")
    mute = fake_root(*COMPLETE, version="none", name="mute")
    fitting, second = fake_root(*COMPLETE, name="fitting"), fake_root(*COMPLETE, name="second")
    refused = (
        f"{empty} (no include/cuda_runtime.h)",
        f"{older} (nvcc 12.8 in {older / 'bin'}, but torch is built for CUDA 13.0)",
        f"{mute} ({mute / 'bin' / 'nvcc'} --version says no version)",
    )
    only_root(empty, older, mute, fitting, second)
    found = setup_cuda.find_toolkit()
    assert isinstance(found, setup_cuda.Toolkit) and found.nvcc == fitting / "bin" / "nvcc"
    assert found.refused == refused
    only_root(empty, older, mute)
    assert setup_cuda.find_toolkit() == f"no CUDA toolkit found for torch {torch.__version__}: {'; '.join(refused)}"


def test_headers_of_another_version_are_never_mixed_in(
    fake_root: Callable[..., Path], only_root: Callable[..., None]
) -> None:
    older = fake_root(*COMPLETE, version="12.8", name="older")
    fitting, wheel = fake_root(*COMPLETE, name="fitting"), fake_root("include/cublas.h", name="wheel")
    only_root(older, fitting, wheels=(wheel,))
    found = setup_cuda.find_toolkit()
    assert isinstance(found, setup_cuda.Toolkit)
    assert found.include_dirs == (fitting / "include", wheel / "include")


def test_the_wheels_of_torch_serve_a_compiler_that_stands_elsewhere(
    fake_root: Callable[..., Path], only_root: Callable[..., None]
) -> None:
    older, bare = fake_root("bin/nvcc", version="12.8", name="older"), fake_root("bin/nvcc", name="bare")
    wheel = fake_root("include/cuda_runtime.h", "lib/libcudart.so.13", name="wheel")
    only_root(older, bare, wheels=(wheel,))
    found = setup_cuda.find_toolkit()
    assert isinstance(found, setup_cuda.Toolkit) and found.nvcc == bare / "bin" / "nvcc"
    assert found.runtime == wheel / "lib" / "libcudart.so.13"


def test_an_nvcc_that_cannot_be_run_is_passed_over(
    fake_root: Callable[..., Path], only_root: Callable[..., None]
) -> None:
    broken, fitting = fake_root(*COMPLETE, name="broken"), fake_root(*COMPLETE, name="fitting")
    (broken / "bin" / "nvcc").write_bytes(b"\x7fELF of another machine")
    only_root(broken, fitting)
    found = setup_cuda.find_toolkit()
    assert isinstance(found, setup_cuda.Toolkit) and found.nvcc == fitting / "bin" / "nvcc"


def test_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA" in str(setup_cuda.find_toolkit())


def test_a_wrapper_on_the_path_leads_to_the_standard_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    toolkit = setup_cuda.find_toolkit()
    if isinstance(toolkit, str):
        pytest.skip("no toolkit in a standard place")
    assert (toolkit.include_dirs[0] / "cuda_runtime.h").exists() and toolkit.nvcc != wrapper


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("9.0", ["-gencode=arch=compute_90,code=sm_90"]),
        (
            "8.0 12.0+PTX",
            [f"-gencode=arch=compute_{a},code={c}" for a, c in (("80", "sm_80"), ("120", "sm_120"))]
            + ["-gencode=arch=compute_120,code=compute_120"],
        ),
        ("9.0a;10.0", ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_100,code=sm_100"]),
    ],
)
def test_the_architecture_list_of_torch_is_honoured(
    asked: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup_cuda.architecture_flags(setup_cuda.architectures().names) == expected


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets torch see GPUs of some capabilities, and no list of architectures."""

    def see(*capabilities: tuple[int, int]) -> None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])

    return see


@pytest.fixture
def nvcc_that_lists(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an nvcc that compiles for some architectures."""

    def make(listed: str) -> Path:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f"#!/bin/sh\n[ \"$1\" = --list-gpu-arch ] && echo '{listed}'\n")
        nvcc.chmod(0o755)
        return nvcc

    return make


DEFAULT = ("8.0", "9.0", "10.0", "12.0+PTX")
NVCC_13 = "compute_75 compute_80 compute_90 compute_100 compute_110 compute_103 compute_120 compute_121"


def test_without_a_list_and_without_a_gpu_a_default_list_is_built(gpus: Callable[..., None]) -> None:
    gpus()
    assert setup_cuda.architectures() == setup_cuda.Architectures(DEFAULT)
    gpus((9, 0), (9, 0))
    assert setup_cuda.architectures() == setup_cuda.Architectures(("9.0",))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("compute_75 compute_80 compute_90", ("8.0", "9.0+PTX")),
        (NVCC_13, DEFAULT),
        ("", DEFAULT),
    ],
)
def test_of_the_default_list_an_older_toolkit_builds_what_it_knows(
    listed: str, expected: tuple[str, ...], gpus: Callable[..., None], nvcc_that_lists: Callable[[str], Path]
) -> None:
    gpus()
    assert setup_cuda.architectures(nvcc_that_lists(listed)) == setup_cuda.Architectures(expected)


TOO_OLD = (
    "none for this machine's GPUs of capability {}, too old: "
    "the kernels need 8.0 or newer, and an nvcc that compiles for it"
)


@pytest.mark.parametrize(
    ("seen", "expected", "remark"),
    [
        # Turing, for which nvcc compiles, has too little shared memory for selection.
        ([(9, 0), (7, 5)], ("9.0",), TOO_OLD.format("7.5")),
        ([(7, 5)], DEFAULT, TOO_OLD.format("7.5")),
        ([(6, 0)], DEFAULT, TOO_OLD.format("6.0")),
        ([(9, 0), (6, 1), (6, 0)], ("9.0",), TOO_OLD.format("6.0, 6.1")),
        # Newer than nvcc: the driver compiles the PTX.
        ([(12, 2), (13, 0)], ("12.1+PTX",), ""),
        ([(10, 3), (8, 9), (8, 0)], ("8.0+PTX", "10.3"), ""),
    ],
)
def test_gpus_that_are_too_old_or_that_nvcc_does_not_know_stop_no_build(
    seen: list[tuple[int, int]],
    expected: tuple[str, ...],
    remark: str,
    gpus: Callable[..., None],
    nvcc_that_lists: Callable[[str], Path],
) -> None:
    gpus(*seen)
    assert setup_cuda.architectures(nvcc_that_lists(NVCC_13)) == setup_cuda.Architectures(expected, remark)


def test_what_is_passed_over_is_said_in_the_line_of_the_build(source_copy: Path, tmp_path: Path) -> None:
    """A machine with a GPU of 2016, and a folder in CUDA_HOME that is no toolkit."""
    site, home = tmp_path / "site", tmp_path / "home"
    site.mkdir()
    home.mkdir()
    (site / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 1\ntorch.cuda.get_device_capability = lambda i: (6, 0)\n"
    )
    script = (
        "import sys; sys.argv = ['setup.py', '--quiet', '--version']; import setup, pathlib; "
        "setup.write_ninja_file(pathlib.Path('build')); setup.write_build_info(pathlib.Path('ait'))"
    )
    variables = {"AIT_CUDA": "", "PYTHONPATH": str(site), "CUDA_HOME": str(home)}
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_CUDA_ARCH_LIST"} | variables
    if isinstance(setup_cuda.find_toolkit(), str):
        pytest.skip("needs a CUDA toolkit")
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=source_copy, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("ait: building against torch")]
    assert TOO_OLD.format("6.0") in line and f"(passed over: {home} (no include/cuda_runtime.h)" in line
    assert TOO_OLD.format("6.0") in (source_copy / "ait" / "_build_info.py").read_text()


def test_without_a_list_of_nvcc_gpus_that_are_too_old_are_known_too(gpus: Callable[..., None]) -> None:
    gpus((7, 5), (8, 6))
    assert setup_cuda.architectures() == setup_cuda.Architectures(("8.6",), TOO_OLD.format("7.5"))


@pytest.mark.parametrize("asked", ["Hopper", "90", "9.0;x"])
def test_a_wrong_architecture_list_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected compute capabilities"):
        setup_cuda.architectures()


def test_an_asked_for_architecture_that_nvcc_does_not_know_is_an_error(
    monkeypatch: pytest.MonkeyPatch, nvcc_that_lists: Callable[[str], Path]
) -> None:
    nvcc = nvcc_that_lists(NVCC_13)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.0;9.0a;12.0+PTX")
    with pytest.raises(SystemExit, match=r"what nvcc compiles for \(7.5, 8.0, .*12.1\), got 6.0 .*AIT_CUDA=0"):
        setup_cuda.architectures(nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a;12.0+PTX")
    assert setup_cuda.architectures(nvcc).names == ("9.0a", "12.0+PTX")


def test_a_missing_toolkit_is_an_error_only_when_asked_for(source_copy: Path, tmp_path: Path) -> None:
    # A torch for which no toolkit can be found, whatever this machine has.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = None\n")
    result = build(source_copy, AIT_CUDA="1", PYTHONPATH=str(site))
    assert result.returncode != 0
    assert "AIT_CUDA=1 asks for CUDA kernels, which cannot be built: torch" in result.stderr
    assert "AIT_CUDA: expected 0 or 1, got 'yes'" in build(source_copy, AIT_CUDA="yes").stderr


RESOURCE_USAGE = """ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    24 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 24 bytes cumulative stack size
"""


def test_resource_usage_is_read_kernel_by_kernel() -> None:
    assert setup_cuda.parse_resource_usage(RESOURCE_USAGE) == {
        "first sm_90": {"registers": 30, "static_shared_bytes": 1024, "stack_bytes": 0, "spill_bytes": 0},
        "second sm_90": {"registers": 128, "static_shared_bytes": 0, "stack_bytes": 24, "spill_bytes": 44},
    }


def compile_with_report(report: str, record: Path) -> int:
    """Compiles with a program in nvcc's place that only prints the report."""
    return setup_cuda.compile_and_record(record, [sys.executable, "-c", f"import sys; sys.stderr.write({report!r})"])


def test_a_compile_leaves_a_record_and_warns_of_spills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_with_report(RESOURCE_USAGE, tmp_path / "record.json") == 0
    assert json.loads((tmp_path / "record.json").read_text())["first sm_90"]["registers"] == 30
    printed = capsys.readouterr().err
    assert "warning: second sm_90 spills 44 bytes" in printed and "first" not in printed


def test_a_compile_without_a_report_fails(tmp_path: Path) -> None:
    assert compile_with_report("", tmp_path / "record.json") == 1


def _build_info() -> dict[str, Any]:
    from ait._build_info import BUILD_INFO

    return BUILD_INFO


@needs_cuda_build
def test_the_build_recorded_the_resources_of_every_kernel_and_none_spills() -> None:
    records = sorted(CUDA_OBJECTS.glob("*.json"))
    assert {path.name.partition(".")[0] for path in records} == {
        path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")
    }
    built = re.findall(r"\d+\.\d[af]?(?=[+,;]|$)", _build_info()["cuda"].partition(" for ")[2])
    assert built
    for path in records:
        usage = json.loads(path.read_text())
        assert {name.split()[1] for name in usage} == {f"sm_{name.replace('.', '')}" for name in built}
        assert all(use["spill_bytes"] == 0 and 0 < use["registers"] <= 255 for use in usage.values())


@needs_cuda_build
def test_every_operator_is_registered_for_cuda_where_no_gpu_is() -> None:
    assert cuda_library_path().exists()
    for name in set(SCHEMAS) - WITHOUT_CUDA_KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ait::{name}", "CUDA"), name


@needs_cuda_build
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_cuda_library_exports_nothing_foreign_and_needs_no_python() -> None:
    run = ["nm", "-DC", "--defined-only", str(cuda_library_path())]
    exported = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not [line for line in exported if "ait::" not in line]
    run = ["nm", "-D", "--undefined-only", str(cuda_library_path())]
    undefined = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert " Py" not in undefined and " _Py" not in undefined


@pytest.mark.parametrize(("running", "reason"), [("12.8", "that of CUDA 12.8"), (None, "a build without CUDA")])
def test_the_library_is_left_out_under_a_torch_of_another_cuda(
    running: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ait._build_info import BUILD_INFO

    monkeypatch.setitem(BUILD_INFO, "cuda_version", "13.0")
    monkeypatch.setattr(torch.version, "cuda", running)
    assert reason in str(why_no_cuda_kernels()) and "reinstall ait" in str(why_no_cuda_kernels())


@needs_toolkit
@pytest.mark.slow
def test_a_failed_cuda_compile_fails_the_build_with_the_compilers_message(source_copy: Path) -> None:
    for path in (source_copy / "csrc" / "cuda").glob("*.cu"):
        path.write_text("#error deliberately broken\n")
    result = build(source_copy, AIT_CUDA="1", AIT_BUILD_CAPABILITIES="baseline", TORCH_CUDA_ARCH_LIST="9.0")
    assert result.returncode != 0
    assert "deliberately broken" in result.stdout + result.stderr
    assert "AIT_CUDA=0 leaves CUDA out" in result.stderr
