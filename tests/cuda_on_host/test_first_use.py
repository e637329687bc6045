"""The first use of kernels on a device: a wrong one is reported, and the reference runs in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ait.ops import _first_use
from tests.ops.common import needs_kernels

from .conftest import run_python

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]

COMPARE = """
import warnings, torch, ait
from ait.ops import reference
from ait.ops._first_use import replace_wrong_kernels
{load}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    wrong = replace_wrong_kernels(torch.device("cpu"), "CPU")
print("wrong:", wrong, [str(w.message) for w in caught if "disagree" in str(w.message)])
state, patterns = torch.randn(9, 4), torch.randn(3, 4)
state.requires_grad_()
out = ait.ops.hopfield_retrieve(state, patterns)[0]
expected = reference.hopfield_retrieve(state, patterns, 1.0, 1, 0.0)[0]
assert torch.allclose(out, expected, atol=1e-5)
out.sum().backward()
assert replace_wrong_kernels(torch.device("cpu"), "CPU") == []
"""
LOAD = "import tests.cuda_on_host.plugin"


def test_right_kernels_agree_with_the_reference(library: Path) -> None:
    result = run_python(library, "-c", COMPARE.format(load=LOAD))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("wrong: [] []"), result.stdout


@pytest.mark.slow
def test_a_wrong_kernel_is_reported_and_replaced(
    broken_library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = broken_library(
        "hopfield_retrieve",
        {"hopfield_retrieve_tile.h": ("row[m] = weight * scale;", "row[m] = weight * scale * C(1.01);")},
    )
    result = run_python(library, "-c", COMPARE.format(load=LOAD))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "wrong: ['hopfield_retrieve'] ['ait: on cpu the kernels of hopfield_retrieve disagree"
    )
    monkeypatch.setenv("AIT_REQUIRE_KERNELS", "1")
    result = run_python(library, "-c", COMPARE.format(load=LOAD))
    assert result.returncode != 0 and "AIT_REQUIRE_KERNELS=1 makes this an error" in result.stderr


class OnCuda:
    """Stands for a tensor in the memory of a GPU."""

    device = torch.device("cuda:3")


def test_each_device_is_compared_once_and_never_during_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.device] = []
    capturing = [True]
    monkeypatch.setattr(_first_use, "why_no_cuda_kernels", lambda: None)
    monkeypatch.setattr(_first_use, "replace_wrong_kernels", lambda device, key: compared.append(device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    _first_use._check_device.cache_clear()
    _first_use._say_that_capture_skips_the_check.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="skipped, since a CUDA graph is being captured"):
            _first_use.check_first_use(OnCuda())  # type: ignore[arg-type]
        assert compared == []
        capturing[0] = False
        for _ in range(2):
            _first_use.check_first_use(OnCuda())  # type: ignore[arg-type]
        assert compared == [torch.device("cuda:3")]
        _first_use.check_first_use(torch.zeros(1))
        assert len(compared) == 1
    finally:
        _first_use._check_device.cache_clear()
        _first_use._say_that_capture_skips_the_check.cache_clear()
