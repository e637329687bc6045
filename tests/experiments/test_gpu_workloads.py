"""What make gpu-check times, without a GPU: a made-up device, made-up profiles, and the calls at a small shape."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import gpu_workloads
import pytest
import torch
from gpu_check import TARGETS
from gpu_workloads import Kernels, milliseconds, milliseconds_of_kernels, workloads
from torch.autograd import DeviceType


class Device:
    """A host that issues and a device that follows: the time of either, in microseconds; a cycle takes 0.5 ns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        self.sleeps: list[int] = []
        monkeypatch.setattr(gpu_workloads, "flush_caches", lambda: self.issue(1.0, 56.0))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def issue(self, on_host: float, on_device: float) -> None:
        self.host += on_host
        self.device = max(self.device, self.host) + on_device

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.issue(1.0, cycles * 5e-4)

    def wait(self) -> None:
        self.host = max(self.host, self.device)


class Event:
    """As torch's: recorded when the device comes to it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = 0.0

    def record(self) -> None:
        self.device.issue(0.0, 0.0)
        self.at = self.device.device

    def query(self) -> bool:
        return self.at <= self.device.host

    def elapsed_time(self, end: Event) -> float:
        return 1e-3 * (end.at - self.at)


def call_of(device: Device, on_host: float) -> Callable[[], None]:
    """Two kernels of 20 us, for each of which the host takes its time."""

    def call() -> None:
        for _ in range(2):
            device.issue(on_host, 20.0)

    return call


def test_what_the_host_takes_is_no_part_of_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert milliseconds(call_of(device, 90.0)) == pytest.approx(0.040)
    assert device.sleeps == [2_000_000]


def test_the_device_sleeps_longer_where_the_host_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert milliseconds(call_of(device, 1500.0)) == pytest.approx(0.040)
    assert device.sleeps == [2_000_000, 4_000_000, 8_000_000]


def test_a_call_that_waits_for_the_device_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    with pytest.raises(RuntimeError, match="not issued while the device slept for 1024000000 cycles"):
        milliseconds(device.wait)


def event(name: str, microseconds: float, kind: DeviceType = DeviceType.CUDA, annotation: bool = False) -> object:
    time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation, time_range=time_range)


SELECT = "void ait::cuda::select_chunk<float>(ait::cuda::SelectChunk<float>)"
PROFILE = [
    event("sm90_xmma_gemm_f32f32", 300.0),
    event(SELECT, 9.0),
    event("sm90_xmma_gemm_f32f32", 290.0),
    event(SELECT, 7.0),
    event("cudaLaunchKernel of select_chunk", 5.0, DeviceType.CPU),
    event("a range with select_chunk", 700.0, annotation=True),
]


def test_the_product_of_a_selection_is_no_part_of_its_time() -> None:
    assert milliseconds_of_kernels(PROFILE, Kernels("select_chunk", 2)) == pytest.approx(0.016)


@pytest.mark.parametrize("lost", [[0, 2, 4, 5], [0, 1, 2, 4, 5]], ids=["all", "one"])
def test_a_profile_that_lost_kernels_gives_no_time(lost: list[int]) -> None:
    events = [PROFILE[i] for i in lost]
    with pytest.raises(RuntimeError, match="expected 2 kernels select_chunk in a profile, got sm90_xmma_gemm"):
        milliseconds_of_kernels(events, Kernels("select_chunk", 2))
    with pytest.raises(RuntimeError, match="got nothing"):
        milliseconds_of_kernels([], Kernels("select_chunk", 2))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workloads of a small shape, of which nothing is compiled."""
    for name, value in {"TOKENS": 40, "WIDTH": 8, "ROWS": 4, "CAPACITY": 6, "SLOTS": 3}.items():
        monkeypatch.setattr(gpu_workloads, name, value)
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_every_call_runs_and_every_target_has_its_row(small: None) -> None:
    rows = {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, workload in workloads(dtype, "cpu").items():
            rows[f"{name}, {str(dtype).removeprefix('torch.')}"] = workload
            for function in workload.implementations.values():
                function()
    for target in TARGETS:
        workload = rows[target.row]
        kind, _, label = target.quantity.partition(" ")
        assert "ait" in workload.implementations
        assert kind != "ratio" or label in workload.implementations
        assert kind != "extra_bytes" or workload.results_bytes is not None


def test_implementations_of_a_row_agree_and_equal_rows_list_the_same_tokens(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    attend = torch.ops.ait.bottleneck_attend

    def recording(query: torch.Tensor, x: torch.Tensor, indices: torch.Tensor) -> object:
        listed.append(indices)
        return attend(query, x, indices)

    monkeypatch.setattr("ait.ops.bottleneck_attend", recording)
    found = workloads(torch.float32, "cpu")
    for name, distinct in {"write": 4, "write, equal rows": 1}.items():
        results = {label: function() for label, function in found[name].implementations.items()}
        for label, result in results.items():
            torch.testing.assert_close(result, results["ait"], msg=label)
        assert len(listed.pop().unique(dim=0)) == distinct
    for name in ("write, backward", "write, equal rows, backward", "write, forward and backward"):
        results = {label: function() for label, function in found[name].implementations.items()}
        for label, result in results.items():
            torch.testing.assert_close(result, results["ait"], msg=label)
