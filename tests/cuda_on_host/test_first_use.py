"""The first use of kernels on a device: a wrong one is reported, and the reference runs in its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ait
from ait.ops import _first_use
from tests.ops.common import needs_kernels

from .conftest import Case, Ending, build_broken, run_cases

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]

COMPARE = """
import warnings, torch, ait
from tests.cuda_on_host.plugin import take_launches
from ait.ops import reference
from ait.ops._first_use import replace_wrong_kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    # What a caller may have set; it must change nothing.
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        wrong = replace_wrong_kernels(torch.device("cpu"), "CPU")
print("wrong:", wrong, [str(w.message) for w in caught if "disagree" in str(w.message)])
products = sum(launch.threads == 0 for launch in take_launches())
print("products:", products)
tokens, query, patterns = torch.randn(9, 4), torch.randn(2, 4), torch.randn(3, 4)
tokens.requires_grad_()
indices = torch.arange(5).expand(2, 5)
out = ait.ops.hopfield_retrieve(tokens, patterns)[0], ait.ops.bottleneck_attend(query, tokens, indices)[0]
expected = (
    reference.hopfield_retrieve(tokens, patterns, 1.0, 1, 0.0)[0],
    reference.bottleneck_attend(query, tokens, indices)[0],
)
for a, e in zip(out, expected):
    assert torch.allclose(a, e, atol=1e-5)
chosen = ait.ops.bottleneck_select(query[None], tokens, 4)[1]
assert torch.equal(chosen, reference.bottleneck_select(query[None], tokens, 4, None, None)[1])
(out[0].sum() + out[1].sum()).backward()
assert replace_wrong_kernels(torch.device("cpu"), "CPU") == []
"""


def test_right_kernels_agree_with_the_reference(library: Path) -> None:
    [(status, output)] = run_cases([Case(library, COMPARE)])
    assert status == 0, output
    assert output.startswith("wrong: [] []"), output
    # Selection: three dtypes, of one chunk and of several; the dense path of attention.
    products = re.search(r"products: (\d+)", output)
    assert products and int(products.group(1)) == 9 + 5


# Operator: what is broken on purpose, and what becomes of it.
BROKEN = {
    "bottleneck_select": ("three_terms.h", ": main + (second + third);", ": main + (second - third);"),
    "bottleneck_attend": (
        "bottleneck_attend_kernel.h",
        "sum = sum * factor + warp_sum(weight);",
        "sum = sum * factor + C(1.01) * warp_sum(weight);",
    ),
    "dense bottleneck_attend": ("bottleneck_attend_dense_kernel.h", "sum[i] = total;", "sum[i] = total * C(1.1);"),
    "hopfield_retrieve": ("hopfield_retrieve_tile.h", "row[m] = weight * scale;", "row[m] = weight * scale * C(1.01);"),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ending]:
    """How the comparison of each broken operator ends, without and with ``AIT_REQUIRE_KERNELS=1``."""
    cases = {}
    for what, slip in BROKEN.items():
        broken = build_broken(tmp_path_factory.mktemp("broken"), what.split()[-1], *slip)
        for required in ("0", "1"):
            cases[what, required] = Case(broken, COMPARE, {"AIT_REQUIRE_KERNELS": required})
    return dict(zip(cases, run_cases(list(cases.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_kernel_is_reported_and_replaced(what: str, endings: dict[tuple[str, str], Ending]) -> None:
    operator = what.split()[-1]
    status, output = endings[what, "0"]
    assert status == 0, output
    assert f"wrong: ['{operator}'] ['ait: on cpu the kernels of {operator} disagree" in output
    status, output = endings[what, "1"]
    assert status != 0 and "AIT_REQUIRE_KERNELS=1 makes this an error" in output


class OnCuda:
    """Stands for a tensor in the memory of a GPU."""

    device = torch.device("cuda:3")


def test_each_device_is_compared_once_and_never_during_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.device] = []
    capturing = [True]
    monkeypatch.setattr(_first_use, "why_no_cuda_kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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


def test_fake_tensors_of_a_device_are_no_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_first_use, "_check", lambda device: pytest.fail("fake tensors were compared"))
    with FakeTensorMode():
        out, _, _ = ait.ops.hopfield_retrieve(torch.empty(4, 8, device="cuda"), torch.empty(3, 8, device="cuda"))
    assert out.device.type == "cuda"


def test_a_trace_that_comes_first_makes_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.device, bool]] = []

    def check(device: torch.device) -> None:
        real = type(torch.zeros(1)) is torch.Tensor
        seen.append((device, real))

    monkeypatch.setattr(_first_use, "_check", check)
    monkeypatch.setattr(_first_use, "DEVICE_TYPE", "cpu")

    def retrieve(state: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        return ait.ops.hopfield_retrieve(state, patterns)[0]

    state, patterns = torch.randn(6, 8), torch.randn(3, 8)
    compiled = torch.compile(retrieve, fullgraph=True, backend="aot_eager")(state, patterns)
    assert torch.equal(compiled, retrieve(state, patterns))
    assert seen[0] == (torch.device("cpu"), True)
