"""Loads the compiled operators and puts the reference operators where no compiled kernel exists.

The schemas are defined by ``csrc/schemas.cpp``. Without the compiled library (``AIT_PURE_PYTHON=1``)
the same schemas are defined here, so that ``torch.ops.ait`` looks alike either way; a test compares both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGE_DIR = Path(__file__).resolve().parent.parent

SCHEMAS = {
    "bottleneck_select": (
        "(Tensor query, Tensor tokens, SymInt k, Tensor? mask=None, "
        "ScalarType? selection_dtype=None) -> (Tensor values, Tensor indices)"
    ),
    "bottleneck_attend": ("(Tensor query, Tensor tokens, Tensor indices) -> (Tensor pooled, Tensor gates, Tensor lse)"),
    "bottleneck_attend_backward": (
        "(Tensor? grad_pooled, Tensor? grad_gates, Tensor? grad_lse, Tensor query, Tensor tokens, "
        "Tensor indices, Tensor pooled, Tensor gates) -> (Tensor grad_query, Tensor grad_tokens)"
    ),
    "hopfield_retrieve": (
        "(Tensor state, Tensor patterns, float beta, int steps, float tol) "
        "-> (Tensor out, Tensor steps_taken, Tensor lse)"
    ),
    "hopfield_retrieve_backward": (
        "(Tensor grad_out, Tensor state, Tensor patterns, Tensor steps_taken, float beta, int steps) "
        "-> (Tensor grad_state, Tensor grad_patterns)"
    ),
    "balance_loss": (
        "(Tensor gates, Tensor indices, Tensor? mask, SymInt num_tokens, int num_heads, float weight) "
        "-> (Tensor loss, Tensor slope)"
    ),
    "balance_loss_backward": "(Tensor grad_loss, Tensor gates, Tensor indices, Tensor slope) -> Tensor",
    "memory_snapshot": "(Tensor memory) -> Tensor",
}
# The snapshot is one implementation for all devices; the balance loss is called for tensors of the CPU alone.
WITHOUT_CUDA_KERNELS = frozenset({"balance_loss", "balance_loss_backward", "memory_snapshot"})


def kernel_library_path() -> Path:
    """Where the Python-free kernel library stands once it is built."""
    return PACKAGE_DIR / "libait_cpu.so"


def cuda_library_path() -> Path:
    """Where the CUDA kernels stand where they were built."""
    return PACKAGE_DIR / "libait_cuda.so"


def why_no_cuda_kernels() -> str | None:
    """Why the CUDA kernels are not loaded, or None where they are."""
    from ait._build_info import BUILD_INFO

    if BUILD_INFO.get("cuda_version") is None:
        return f"kernels {BUILD_INFO['cuda']}"
    built_for = BUILD_INFO["cuda_version"].split(".")[0]
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != built_for:
        running = f"that of CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return f"kernels built for the torch of CUDA {built_for}, and this torch is {running}; reinstall ait"
    if not cuda_library_path().exists():
        return f"kernels missing ({cuda_library_path()}); reinstall ait"
    return None


def is_pure_python() -> bool:
    """Whether the reference operators were asked for instead of compiled ones (``AIT_PURE_PYTHON=1``)."""
    if os.environ.get("AIT_PURE_PYTHON") == "1":
        return True
    if importlib.util.find_spec("ait._build_info") is None:
        return False
    from ait._build_info import BUILD_INFO

    return bool(BUILD_INFO["pure_python"])


def _load() -> torch.library.Library:
    if is_pure_python():
        warnings.warn(
            "ait runs its reference operators, in plain PyTorch, because AIT_PURE_PYTHON=1 asked for them; "
            "reinstall without it for the compiled kernels",
            RuntimeWarning,
            stacklevel=2,
        )
        library = torch.library.Library("ait", "FRAGMENT")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        return library
    path = kernel_library_path()
    if not path.exists():
        raise ImportError(
            f"ait: the compiled operators are missing ({path}). Build them with `pip install .` in the "
            "source folder, or set AIT_PURE_PYTHON=1 to run the slower reference operators."
        )
    torch.ops.load_library(str(path))
    if why_no_cuda_kernels() is None:
        torch.ops.load_library(str(cuda_library_path()))
    return torch.library.Library("ait", "IMPL")


LIBRARY = _load()


def _cure() -> str:
    """What would give this torch the CUDA kernels that were not built, as the end of a sentence."""
    from ait._build_info import BUILD_INFO

    if BUILD_INFO.get("cuda_version") is not None or torch.version.cuda is None:
        return ""
    toolkit = f"a toolkit of CUDA {torch.version.cuda.split('.')[0]} (nvcc on the PATH, or CUDA_HOME)"
    command = "AIT_CUDA=1 pip install --no-build-isolation ."
    return f"; with {toolkit}, `{command}` in the source folder builds them"


@functools.cache
def _announce_reference(device_type: str) -> None:
    """Says once for each device type that the reference operators run there, and what would help."""
    reason = f"ait has no kernels for device type '{device_type}'"
    if device_type == "cuda":
        missing = why_no_cuda_kernels()
        reason = missing + _cure() if missing else "this operator has no CUDA kernel"
        reason += " (see ait.show_config())"
    message = f"ait runs its reference operators, in plain PyTorch, on '{device_type}': {reason}"
    if os.environ.get("AIT_REQUIRE_KERNELS") == "1":
        raise RuntimeError(message + "; AIT_REQUIRE_KERNELS=1 makes this an error")
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def device_of(args: tuple[Any, ...]) -> torch.device:
    """The device of a call: that of its first tensor."""
    return next(arg for arg in args if isinstance(arg, torch.Tensor)).device


def register_reference(name: str, reference: Callable[..., Any]) -> None:
    """Runs ``reference`` for ``ait::name`` on every device that has no compiled kernel."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_pure_python():
            _announce_reference(device_of(args).type)
        return reference(*args, **kwargs)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
