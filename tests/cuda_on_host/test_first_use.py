"""The first use of kernels on a device: a wrong one is reported, and the reference runs in its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ait
from ait.ops import _first_use
from tests.ops.common import needs_kernels

from .conftest import Case, Ending, build_broken, run_cases

pytestmark = [needs_kernels, pytest.mark.xdist_group("cuda_on_host")]

# With so many multiprocessors as slabs want for two ranges of tokens.
SETTINGS = "1,232448,8,0,-1"
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
    [(status, output)] = run_cases([Case(library, COMPARE, {"AIT_CUDA_ON_HOST": SETTINGS})])
    assert status == 0, output
    assert output.startswith("wrong: [] []"), output
    # Selection: four dtypes, of one chunk and of two, three for float64; the dense path of attention.
    products = re.search(r"products: (\d+)", output)
    assert products and int(products.group(1)) == 4 + 3 * 2 + 3 + 5


@pytest.mark.parametrize("dtype", _first_use.TOLERANCE)
def test_one_percent_is_told_from_rounding(dtype: torch.dtype) -> None:
    expected = _first_use._numbers(500, step=0.7) / 50
    right, off = (expected * (1 + 1e-12)).to(dtype), (expected * 1.01).to(dtype)
    assert _first_use._close((right,), (expected,), _first_use.TOLERANCE[dtype])
    assert not _first_use._close((off,), (expected,), _first_use.TOLERANCE[dtype])


# Operator: what is broken on purpose, and what becomes of it.
BROKEN = {
    "bottleneck_select": ("three_terms.h", ": main + (second + third);", ": main + (second - third);"),
    "bottleneck_attend": (
        "bottleneck_attend_kernel.h",
        "sum = sum * factor + warp_sum(weight);",
        "sum = sum * factor + C(1.01) * warp_sum(weight);",
    ),
    # What takes as many tokens as have two ranges, and as many rows as have two masks of a warp.
    "slabs of bottleneck_attend": (
        "bottleneck_attend_slab_kernel.h",
        "const C gate = a.entry_gates[i], grad_logit = a.entry_grads[i];",
        "C gate = a.entry_gates[i], grad_logit = a.entry_grads[i];\n gate *= range > 0 ? C(1.01) : C(1);",
    ),
    "many rows of bottleneck_attend": (
        "bottleneck_attend_slab_kernel.h",
        "a.entry_rows[place] = int(row);",
        "a.entry_rows[place] = int(row % kWarpSize);",
    ),
    "dense bottleneck_attend": ("bottleneck_attend_dense_kernel.h", "sum[i] = total;", "sum[i] = total * C(1.1);"),
    "hopfield_retrieve": ("hopfield_retrieve_tile.h", "row[m] = weight * scale;", "row[m] = weight * scale * C(1.01);"),
    "whole tiles of hopfield_retrieve": (
        "hopfield_retrieve_tile.h",
        "x[i] = load_pack(source, (first + t) * tile.width + e);",
        "x[i] = load_pack(source, (first + t) * tile.width + (column == 28 ? block : e));",
    ),
    "backward of hopfield_retrieve": (
        "hopfield_retrieve_kernel.h",
        "result = beta * weight * (grad - mean);",
        "result = C(1.01) * beta * weight * (grad - mean);",
    ),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ending]:
    """How the comparison of each broken operator ends, without and with ``AIT_REQUIRE_KERNELS=1``."""
    cases = {}
    for what, slip in BROKEN.items():
        broken = build_broken(tmp_path_factory.mktemp("broken"), what.split()[-1], *slip)
        for required in ("0", "1"):
            variables = {"AIT_REQUIRE_KERNELS": required, "AIT_CUDA_ON_HOST": SETTINGS}
            cases[what, required] = Case(broken, COMPARE, variables)
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


# A made-up table of devices: the calls of this process say where they are. Gates are 1 % too small in the kernel.
DEVICE_BY_DEVICE = """
import warnings, torch, ait
import tests.cuda_on_host.plugin
from ait.ops import _first_use, reference
here = [torch.device("cuda:0")]
_first_use.device_of = lambda args: here[0]
right = dict.fromkeys(_first_use.COMPARISONS, lambda device: True)
right["bottleneck_attend"] = lambda device: device.index == 1
_first_use.COMPARISONS = right
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for i in range(3):
        _first_use.VERDICTS[torch.device("cuda", i)] = _first_use.replace_wrong_kernels(torch.device("cuda", i), "CPU")

query, tokens = torch.randn(2, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
indices = torch.arange(5).expand(2, 5)
expected = reference.bottleneck_attend(query, tokens, indices)
gradients = torch.autograd.grad(expected[0].square().sum(), (query, tokens))
for i in range(4):  # nothing was said of the last one
    here[0] = torch.device("cuda", i)
    actual = ait.ops.bottleneck_attend(query, tokens, indices)
    agrees = torch.allclose(actual[1], expected[1], atol=1e-5)
    print(i, "reference" if agrees else "kernel")
    if agrees:
        for a, e in zip(torch.autograd.grad(actual[0].square().sum(), (query, tokens)), gradients):
            assert torch.allclose(a, e, atol=1e-5)
    # Arguments that are left at their defaults reach an operator, too.
    assert torch.ops.ait.bottleneck_select(query[None], tokens, 3)[0].shape == (1, 2, 3)
kernels = ait.show_config("dicts")["kernels"]
print(kernels["bottleneck_attend_backward"], "|", kernels["hopfield_retrieve"])
"""


@pytest.mark.slow
def test_a_kernel_that_is_wrong_on_one_device_is_replaced_there_alone(tmp_path: Path) -> None:
    slip = BROKEN["bottleneck_attend"]
    [(status, output)] = run_cases([Case(build_broken(tmp_path, "bottleneck_attend", *slip), DEVICE_BY_DEVICE)])
    assert status == 0, output
    assert "0 reference\n1 kernel\n2 reference\n3 kernel\n" in output
    told = output.splitlines()[-1].split(" | ")
    assert told[0].endswith("reference elsewhere and on cuda:0, cuda:2, where the kernel was found to be wrong")
    assert told[1].endswith("reference elsewhere")


class OnCuda:
    """Stands for a tensor in the memory of a GPU."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Four GPUs that nothing runs on: those that capture, the current one, and those that were compared."""
    state: dict[str, list[int]] = {"capturing": [], "current": [0], "compared": []}

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            state["current"].append(self.index)

        def __exit__(self, *args: object) -> None:
            state["current"].pop()

    def compare(device: torch.device, dispatch_key: str) -> list[str]:
        assert dispatch_key == "CUDA"
        state["compared"].append(device.index)
        return []

    monkeypatch.setattr(_first_use, "_has_kernels", lambda: True)
    monkeypatch.setattr(_first_use, "replace_wrong_kernels", compare)
    monkeypatch.setattr(_first_use, "VERDICTS", {})
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["current"][-1] in state["capturing"])
    _first_use._say_that_capture_skips_the_check.cache_clear()
    return state


def use(index: int) -> None:
    _first_use.check_first_use(OnCuda(index))  # type: ignore[arg-type]


def test_each_device_is_compared_once(gpus: dict[str, list[int]]) -> None:
    for index in (3, 3, 1, 3, 1):
        use(index)
    _first_use.check_first_use(torch.zeros(1))
    assert gpus["compared"] == [3, 1]


def test_nothing_is_compared_while_a_graph_is_captured_and_that_is_said(gpus: dict[str, list[int]]) -> None:
    gpus["capturing"] = [3]  # which is not the current device
    with pytest.warns(RuntimeWarning, match="on cuda:3 was skipped, since a CUDA graph is being captured"):
        use(3)
    use(1)
    assert gpus["compared"] == [1]
    gpus["capturing"] = [0]  # the current device: its capture forbids all of them to allocate
    with pytest.warns(RuntimeWarning, match="on cuda:2 was skipped"):
        use(2)
    use(1)
    gpus["capturing"] = []
    use(3)
    assert gpus["compared"] == [1, 3]


def test_a_mode_of_the_caller_does_not_see_the_comparison(
    gpus: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def compare(device: torch.device, dispatch_key: str) -> list[str]:
        assert torch.ones(2).sum() == 2
        return []

    monkeypatch.setattr(_first_use, "replace_wrong_kernels", compare)
    with Counter() as counter:
        use(0)
        assert counter.calls == 0
        torch.ones(2)
    assert counter.calls == 1 and list(_first_use.VERDICTS) == [torch.device("cuda:0")]


def test_fake_tensors_of_a_device_are_no_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_first_use, "_check", lambda device: pytest.fail("fake tensors were compared"))
    with FakeTensorMode():
        out, _, _ = ait.ops.hopfield_retrieve(torch.empty(4, 8, device="cuda"), torch.empty(3, 8, device="cuda"))
    assert out.device.type == "cuda"


def test_a_trace_that_comes_first_makes_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.device] = []

    def compare(device: torch.device, dispatch_key: str) -> list[str]:
        assert type(torch.zeros(1)) is torch.Tensor  # no fake one, and none that is traced
        compared.append(device)
        return []

    monkeypatch.setattr(_first_use, "replace_wrong_kernels", compare)
    monkeypatch.setattr(_first_use, "_has_kernels", lambda: True)
    monkeypatch.setattr(_first_use, "_is_capturing", lambda device: False)
    monkeypatch.setattr(_first_use, "VERDICTS", {})
    monkeypatch.setattr(_first_use, "DEVICE_TYPE", "cpu")

    def retrieve(state: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        return ait.ops.hopfield_retrieve(state, patterns)[0]

    state, patterns = torch.randn(6, 8), torch.randn(3, 8)
    compiled = torch.compile(retrieve, fullgraph=True, backend="aot_eager")(state, patterns)
    assert compared == [torch.device("cpu")]
    assert torch.equal(compiled, retrieve(state, patterns)) and len(compared) == 1
