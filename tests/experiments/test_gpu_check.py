"""make gpu-check without a GPU: what it says it needs, which steps it takes, and what it makes of times."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Config, gaps, judge, line_of, main, measure, missing_requirements, row_of, steps, verdicts
from gpu_workloads import Workload

from setup_cuda import Toolkit

find_sanitizer = gpu_check.find_sanitizer
ROOT = Path(gpu_check.__file__).resolve().parents[2]
RATES = {"bfloat16": 4e14, "float32": 5e13}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    script = ROOT / "experiments" / "bench" / "gpu_check.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={**os.environ})
    assert result.returncode != 0
    assert "gpu_check: this machine lacks\n" in result.stderr and "an NVIDIA GPU and its driver" in result.stderr


def test_kernels_are_loaded_after_they_were_built() -> None:
    script = "import gpu_check, sys; assert 'ait' not in sys.modules"
    folders = os.pathsep.join(map(str, (ROOT / "experiments" / "bench", ROOT)))
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folders}
    )
    assert result.returncode == 0, result.stderr


def test_a_torch_without_cuda_and_a_missing_toolkit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = missing_requirements(Config())
    assert len(missing) == 3 and "a torch built for CUDA" in missing[0] and "a CUDA toolkit" in missing[2]
    assert len(missing_requirements(Config(build=False))) == 2


def test_every_tool_of_the_sanitizer_runs_the_tests_on_the_device() -> None:
    chosen = steps(Config(), "/opt/compute-sanitizer")
    assert list(chosen)[:2] == ["build", "tests"]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command, variables = chosen[tool]
        assert command[:3] == ["/opt/compute-sanitizer", "--tool", tool]
        # Errors have to reach the exit status, of child processes too.
        assert command[3:7] == ["--error-exitcode", "9", "--target-processes", "all"]
        # Without torch's cache of memory no graph can be captured.
        assert variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and "not graph" in command[-1]
        assert variables["AIT_REQUIRE_KERNELS"] == "1" and variables["AIT_GPU_SMALL_SHAPES"] == "1"
    for operator in ("bottleneck_select", "bottleneck_attend", "hopfield_retrieve"):
        command, _ = chosen[f"tests of {operator}"]
        assert "tests.gpu.plugin" in command and "not (bad_lists or checks_what)" in command[-1]
    assert not set(steps(Config(), None)) & {"memcheck", "racecheck", "initcheck", "synccheck"}
    assert steps(Config(build=False, tests=False, sanitizer=False), "x") == {}


def test_what_cannot_be_run_makes_the_check_incomplete_and_what_is_left_out_is_told() -> None:
    assert gaps(Config(), "/opt/compute-sanitizer", 2) == []
    [missing] = gaps(Config(), None, 2)
    assert missing.what == "compute-sanitizer" and missing.asked_for and "--no-sanitizer" in missing.reason
    [alone] = gaps(Config(), "/opt/compute-sanitizer", 1)
    assert alone.what == "tests of a second device" and not alone.asked_for
    left_out = gaps(Config(build=False, tests=False, sanitizer=False, rounds=0), None, 1)
    assert [gap.what for gap in left_out] == ["build", "tests", "times", "compute-sanitizer"]
    assert not any(gap.asked_for for gap in left_out)


def test_the_sanitizer_is_found_beside_the_compiler_of_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    toolkit = Toolkit(tmp_path / "bin" / "nvcc", (), tmp_path, "13.0")
    assert find_sanitizer(toolkit) is None and find_sanitizer("no toolkit") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").write_text("")
    (tmp_path / "bin" / "compute-sanitizer").chmod(0o755)
    assert find_sanitizer(toolkit) == str(tmp_path / "bin" / "compute-sanitizer")


@pytest.mark.parametrize(
    ("status", "output", "passes"),
    [
        (0, "31 passed, 2 skipped in 3s", True),
        (0, "33 skipped in 3s", False),
        (0, "", False),
        (1, "1 failed, 30 passed", False),
        (9, "31 passed\nERROR SUMMARY: 3 errors", False),
    ],
)
def test_tests_pass_only_where_some_ran(status: int, output: str, passes: bool) -> None:
    assert judge(status, output, is_test=True).passed is passes


def test_a_row_holds_medians_ratios_and_the_fraction_of_the_larger_floor() -> None:
    implementations = dict.fromkeys(("ait", "eager"), lambda: None)
    # 2 GB at 1 TB/s take 2 ms, 4e12 operations at 4e14 a second 10 ms.
    by_flops = Workload(2e9, implementations, {"bfloat16": 4e12})
    times = {"ait": [20.0, 40.0, 20.0], "eager": [40.0, 120.0, 40.0]}
    row = row_of(by_flops, times, 1e12, RATES)
    assert row["ait_us"] == pytest.approx(20_000) and row["floor_us"] == pytest.approx(10_000)
    assert row["fraction_of_floor"] == pytest.approx(0.5) and row["ratio eager"] == pytest.approx(2.0)
    assert row_of(Workload(2e9, implementations), times, 1e12, RATES)["floor_us"] == pytest.approx(2_000)
    line = line_of("write", row)
    assert "20000.0 us" in line and "50% of it" in line and "eager 2.00x" in line


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = {
        "write, bfloat16": {"ait_us": 100.0},
        "write, forward and backward, bfloat16": {"ratio compiled": 3.0, "extra_bytes": 39e6},
    }
    found = {(v["row"], v["quantity"]): v["met"] for v in verdicts(rows)}
    assert found["write, bfloat16", "ait_us"] is True
    assert found["write, forward and backward, bfloat16", "ratio compiled"] is False
    assert found["write, forward and backward, bfloat16", "extra_bytes"] is True
    assert found["write, backward, bfloat16", "ait_us"] is None


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A GPU on which nothing runs: commands pass, and times are made up."""
    commands: dict[str, object] = {}

    def run(command: list[str], **variables: str) -> tuple[int, str]:
        commands[" ".join(command)] = variables
        answers = {"git": "c0ffee+\n", "nvidia-smi": "580.12\n580.12\n"}
        return (0, answers.get(command[0], "3 passed"))

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "missing_requirements", lambda config: [])
    monkeypatch.setattr(gpu_check, "measured_rates", lambda: (1e12, dict(RATES)))
    monkeypatch.setattr(gpu_check, "peak_bytes", lambda function: 60e6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda toolkit: "/opt/compute-sanitizer")
    turns: list[str] = []
    implementations = {"ait": lambda: turns.append("ait"), "compiled": lambda: turns.append("compiled")}
    one = Workload(1e8, implementations, results_bytes=50e6)
    monkeypatch.setattr(gpu_check, "workloads", lambda dtype: {"write": one, "write, forward and backward": one})
    return {"commands": commands, "turns": turns}


def test_rows_are_timed_by_turns(fake_gpu: dict[str, object]) -> None:
    def clock(function, kernels) -> float:
        function()
        return 0.2 if fake_gpu["turns"][-1] == "ait" else 0.9  # type: ignore[index]

    report: dict = {}
    assert measure(Config(rounds=2), report, clock) == {}
    assert report["rates"]["bandwidth_bytes_per_second"] == 1e12
    rows = report["times"]
    assert set(rows) >= {"write, bfloat16", "write, float32"}
    row = rows["write, forward and backward, bfloat16"]
    assert row["ratio compiled"] == pytest.approx(4.5) and row["extra_bytes"] == 10e6
    assert row["fraction_of_floor"] == pytest.approx(0.5)
    assert fake_gpu["turns"][6:10] == ["ait", "compiled", "ait", "compiled"]  # type: ignore[index]


def made_up_times(monkeypatch: pytest.MonkeyPatch, clock) -> None:
    """What a clock says in place of a GPU's."""
    inner = gpu_check.measure
    monkeypatch.setattr(gpu_check, "measure", lambda config, report: inner(config, report, clock))


def test_the_report_holds_versions_outcomes_times_and_targets(
    fake_gpu: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_times(monkeypatch, lambda function, kernels: 0.1)
    out = tmp_path / "report.json"
    main(Config(rounds=3, out=out))
    report = json.loads(out.read_text())
    assert report["result"] == "passed" and report["not run"] == []
    assert report["kernels"].keys() >= {"bottleneck_select", "hopfield_retrieve_backward"}
    assert report["gpu"] == "Card X" and report["torch"] == torch.__version__
    assert report["driver"] == "580.12" and report["commit"] == "c0ffee+"
    assert report["ait"] == importlib.import_module("ait").__version__
    assert all(outcome["passed"] for outcome in report["outcomes"].values())
    assert report["times"]["write, bfloat16"]["ait_us"] == pytest.approx(100.0)
    met = {(v["row"], v["quantity"]): v["met"] for v in report["targets (H200)"]}
    assert met["write, bfloat16", "ait_us"] is True
    printed = capsys.readouterr().out
    assert f"report: {out}\ngpu_check: passed\n" in printed
    assert "write, backward, bfloat16: ait_us <= 120: not measured" in printed


def test_without_compute_sanitizer_the_end_is_no_success(
    fake_gpu: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda toolkit: None)
    with pytest.raises(SystemExit) as ending:
        main(Config(rounds=0, out=tmp_path / "report.json"))
    assert ending.value.code == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["result"] == "incomplete"
    assert [gap["what"] for gap in report["not run"] if gap["asked_for"]] == ["compute-sanitizer"]
    printed = capsys.readouterr().out
    assert "not run: compute-sanitizer (neither on the PATH" in printed
    assert printed.endswith("gpu_check: incomplete: compute-sanitizer did not run\n")
    # Who asks to do without it gets a success, which says so.
    main(Config(rounds=0, sanitizer=False, out=tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["result"] == "passed" and {gap["what"] for gap in report["not run"]} == {"compute-sanitizer", "times"}


def test_a_failed_step_ends_without_times_but_with_a_report(
    fake_gpu: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda command, **variables: (0, "5 skipped"))
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda toolkit: None)
    with pytest.raises(SystemExit) as ending:
        main(Config(rounds=3, out=tmp_path / "report.json"))
    assert ending.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["result"] == "failed" and not report["outcomes"]["tests"]["passed"] and "times" not in report


def test_a_failure_while_timing_keeps_the_report_and_ends_with_1(
    fake_gpu: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    before = []

    def clock(function, kernels) -> float:
        if not before:
            before.append(json.loads(out.read_text()))
            raise RuntimeError("out of luck")
        return 0.1

    made_up_times(monkeypatch, clock)
    with pytest.raises(SystemExit) as ending:
        main(Config(rounds=3, out=out))
    assert ending.value.code == 1
    # A process that dies while it measures leaves a report, which claims no success.
    assert before[0]["result"] == "incomplete" and before[0]["outcomes"]["tests"]["passed"]
    assert [gap["what"] for gap in before[0]["not run"]] == ["times"]
    report = json.loads(out.read_text())
    assert report["result"] == "failed" and report["outcomes"]["tests"]["passed"] and report["not run"] == []
    outcome = report["outcomes"]["times"]
    assert outcome["passed"] is False and outcome["summary"] == "3 rows; write, bfloat16 failed"
    assert outcome["output"].endswith("RuntimeError: out of luck\n")
    # The other rows were measured all the same.
    assert "write, bfloat16" not in report["times"] and len(report["times"]) == 3
    met = {(v["row"], v["quantity"]): v["met"] for v in report["targets (H200)"]}
    assert met["write, bfloat16", "ait_us"] is None and met["write, float32", "ait_us"] is True
    assert capsys.readouterr().out.endswith("gpu_check: failed\n")


def test_without_rates_nothing_is_timed_but_the_report_is_there(
    fake_gpu: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rates() -> tuple[float, dict[str, float]]:
        raise torch.cuda.OutOfMemoryError("too large")

    monkeypatch.setattr(gpu_check, "measured_rates", no_rates)
    with pytest.raises(SystemExit) as ending:
        main(Config(rounds=3, out=tmp_path / "report.json"))
    assert ending.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outcomes"]["times"]["summary"] == "0 rows; times failed" and report["times"] == {}
    assert report["outcomes"]["tests"]["passed"] and "too large" in report["outcomes"]["times"]["output"]


def test_versions_that_no_command_tells_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.told_by("no-such-command-anywhere") is None
    monkeypatch.setattr(gpu_check, "run", lambda command: (9, "NVIDIA-SMI has failed"))
    assert gpu_check.told_by("nvidia-smi") is None
    monkeypatch.setattr(gpu_check, "run", lambda command: (0, ""))
    assert gpu_check.told_by("git") is None
