"""What a build says and does when something is missing, and what the built library may hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ait.ops import _library, reference
from ait.ops._library import SCHEMAS, kernel_library_path
from tests.distributions import ROOT, Environment, run

pytestmark = pytest.mark.xdist_group("packaging")

BUILD_DIR = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def build(source: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return run([sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))], cwd=source, env=environment)


def test_schemas_in_python_are_those_of_the_library() -> None:
    for name, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.ait, name).default._schema) == f"ait::{name}{schema}"


def test_missing_compiler_is_named(source_copy: Path) -> None:
    result = build(source_copy, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler: 'no-such-compiler' is not on the PATH" in result.stderr


def test_failed_compile_fails_the_build_with_the_compilers_message(source_copy: Path) -> None:
    (source_copy / "csrc" / "schemas.cpp").write_text("#error deliberately broken\n")
    result = build(source_copy, AIT_BUILD_CAPABILITIES="baseline")
    assert result.returncode != 0
    assert "deliberately broken" in result.stdout + result.stderr
    assert "compiling the kernels failed" in result.stderr
    assert not list((source_copy / "ait").glob("*.so"))


@pytest.mark.parametrize("value", ["sse9", "", "avx2,neon"])
def test_unknown_capability_is_refused(source_copy: Path, value: str) -> None:
    result = build(source_copy, AIT_BUILD_CAPABILITIES=value)
    assert result.returncode != 0
    assert "AIT_BUILD_CAPABILITIES: expected some of" in result.stderr


def test_import_of_an_unbuilt_checkout_says_how_to_build(source_copy: Path) -> None:
    result = run([sys.executable, "-c", "import ait"], cwd=source_copy)
    assert "the compiled operators are missing" in result.stderr
    assert "pip install ." in result.stderr


def test_pure_python_installs_without_a_compiler_and_says_so_once(
    source_copy: Path, make_environment: Callable[[], Environment]
) -> None:
    variables = {"AIT_PURE_PYTHON": "1", "CXX": "no-such-compiler"}
    result = run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."],
        cwd=source_copy,
        env={**os.environ, **variables},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (source_copy / "dist").glob("*-py3-none-any.whl")
    environment = make_environment()
    environment.link_distributions("torch", "numpy")
    environment.pip_install("--no-deps", str(wheel))
    script = (
        "import torch, ait\n"
        "layer = ait.GlobalWorkspaceLayer(16, num_slots=4, slot_dim=4, num_heads=2)\n"
        "layer(torch.randn(2, 8, 16)).sum().backward()\n"
        "assert set(ait.show_config('dicts')['kernels'].values()) == {'reference'}\n"
    )
    result = environment.run_python(script)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("AIT_PURE_PYTHON=1 asked for them") == 1


def test_devices_without_kernels_can_be_made_an_error() -> None:
    script = (
        "import warnings, torch\n"
        "from ait.ops._library import _announce_reference\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    try:\n"
        "        _announce_reference('mps'); _announce_reference('mps')\n"
        "    except RuntimeError as error:\n"
        "        print('error:', error)\n"
        "print(len(caught), 'warnings')\n"
    )
    quiet = {key: value for key, value in os.environ.items() if key != "AIT_REQUIRE_KERNELS"}
    assert "1 warnings" in run([sys.executable, "-c", script], cwd=ROOT, env=quiet).stdout
    strict = run([sys.executable, "-c", script], cwd=ROOT, env={**quiet, "AIT_REQUIRE_KERNELS": "1"}).stdout
    assert "error: ait runs its reference operators" in strict
    assert "0 warnings" in strict


@pytest.mark.parametrize("required", [False, True])
def test_a_build_without_cuda_given_cuda_tensors_runs_the_reference_and_says_how_to_help(
    required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Registered:
        def impl(self, name: str, function: Callable[..., object], key: str) -> None:
            self.function, self.key = function, key

    if _library.is_pure_python():
        pytest.skip("the reference was asked for")
    from ait._build_info import BUILD_INFO

    registered = Registered()
    monkeypatch.setattr(_library, "LIBRARY", registered)
    monkeypatch.setitem(BUILD_INFO, "cuda_version", None)
    monkeypatch.setitem(BUILD_INFO, "cuda", "not built: no CUDA toolkit found")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("AIT_REQUIRE_KERNELS", raising=False)
    if required:
        monkeypatch.setenv("AIT_REQUIRE_KERNELS", "1")
    _library._announce_reference.cache_clear()
    try:
        _library.register_reference("hopfield_retrieve", reference.hopfield_retrieve)
        assert registered.key == "CompositeExplicitAutograd"  # every device without a kernel of its own
        with FakeTensorMode():
            arguments = torch.zeros(4, 8, device="cuda"), torch.zeros(3, 8, device="cuda"), 1.0, 1, 0.0
            message = (
                "reference operators.*on 'cuda': kernels not built: no CUDA toolkit found; with a toolkit of CUDA 13 .*"
                "`AIT_CUDA=1 pip install --no-build-isolation .` in the source folder builds them .see ait.show_config"
            )
            if required:
                with pytest.raises(RuntimeError, match=message + ".*AIT_REQUIRE_KERNELS=1 makes this an error"):
                    registered.function(*arguments)
                return
            with pytest.warns(RuntimeWarning, match=message):
                out, _, _ = registered.function(*arguments)
            assert out.device.type == "cuda"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                registered.function(*arguments)
    finally:
        _library._announce_reference.cache_clear()


needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


@needs_binutils
def test_variants_hold_no_inline_function_that_the_linker_could_share() -> None:
    variants = sorted(BUILD_DIR.glob("cpu/*_kernel.*.o"))
    assert variants, f"no kernel objects in {BUILD_DIR}: build the package in this checkout first"
    for path in variants:
        symbols = run(["nm", "--defined-only", str(path)]).stdout.splitlines()
        shared = [line for line in symbols if line.split()[-2] in "WVu"]
        assert not shared, f"{path.name}: {shared}"


@needs_binutils
def test_library_exports_only_its_own_interface_and_needs_no_python() -> None:
    library = str(kernel_library_path())
    exported = run(["nm", "-DC", "--defined-only", library]).stdout.splitlines()
    foreign = [line for line in exported if "ait::" not in line]
    assert exported and not foreign, foreign
    undefined = run(["nm", "-D", "--undefined-only", library]).stdout
    assert " Py" not in undefined and " _Py" not in undefined
