"""The benchmarks: their baselines compute what the operators compute, and their ratios are ratios."""

from __future__ import annotations

import json
import time

import pytest
import sections
import sweep
import timing
import torch
from baselines import batched_write, gram_retrieve, ours_write, plain_retrieve, published_write
from limits import EXP_FLOPS, fresh_pages, read_all, retrieval_flops
from peak_memory import in_own_process, peak_bytes, select_extra_bytes, write_extra_bytes
from sections import SECTIONS, Config
from table import Limit, Row, Target
from timing import LARGE_RESULTS, Rounds, Spread, by_turns
from workloads import Shape, distributions

from ait.nn.writer import BottleneckWriter
from ait.ops import hopfield_retrieve


@pytest.mark.parametrize("baseline", [batched_write, published_write])
@pytest.mark.parametrize(("num_slots", "k"), [(4, 9), (64, 9)], ids=["absorbed", "projected keys"])
def test_write_baselines_equal_ours_with_every_gradient(baseline, num_slots, k):
    torch.manual_seed(0)
    options = dict(num_slots=num_slots, slot_dim=8, num_heads=3, dropout=0.0, selection_dtype=None)
    writer = BottleneckWriter(20, dtype=torch.float64, **options)
    memory = torch.randn(num_slots, 8, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(50, 20, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(num_slots, 8, dtype=torch.float64)
    results = []
    for write in (ours_write, baseline):
        candidate, loss = write(writer, memory, tokens, k)
        inputs = [memory, tokens, *writer.parameters()]
        gradients = torch.autograd.grad((candidate * direction).sum() + loss, inputs)
        results.append([candidate, loss, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("baseline", [plain_retrieve, gram_retrieve])
def test_retrieval_baselines_equal_ours_with_every_gradient(baseline, steps):
    torch.manual_seed(0)
    state = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    patterns = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    ours = hopfield_retrieve(state, patterns, 0.7, steps)[0]
    theirs = baseline(state, patterns, 0.7, steps)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    for own, other in zip(
        torch.autograd.grad((ours * direction).sum(), [state, patterns]),
        torch.autograd.grad((theirs * direction).sum(), [state, patterns]),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_by_turns_alternates_and_does_not_count_the_warm_up():
    calls: list[str] = []
    rounds = by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert len(rounds.seconds["a"]) == len(rounds.seconds["b"]) == 2


def test_by_turns_keeps_its_order_on_request():
    calls: list[str] = []
    by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, warm_up=1, alternating=False)
    assert calls == ["a", "b"] * 3


def test_memory_is_touched_before_each_call_and_outside_its_time(monkeypatch):
    calls: list[object] = []

    def touch(num_bytes: int) -> None:
        calls.append(num_bytes)
        time.sleep(0.05)

    monkeypatch.setattr(timing, "fresh_pages", touch)
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    rounds = by_turns(functions, rounds=1, warm_up=1, touched_bytes=64)
    assert calls == [64, "a", 64, "b", 64, "b", 64, "a"]
    assert max(rounds.seconds["a"] + rounds.seconds["b"]) < 0.05
    calls.clear()
    by_turns(functions, rounds=1, warm_up=0)
    assert calls == ["a", "b"]


@pytest.mark.parametrize("section", ["write", "hopfield", "select", "small", "long"])
def test_only_sections_of_large_results_touch_memory_before_a_call(section, monkeypatch):
    class Stop(Exception):
        pass

    touched: list[int] = []

    def by_turns_stopped(*args: object, touched_bytes: int = 0, **kwargs: object) -> None:
        touched.append(touched_bytes)
        raise Stop

    monkeypatch.setattr(sections, "by_turns", by_turns_stopped)
    with pytest.raises(Stop):
        next(SECTIONS[section](Config(tokens=1024, compile=False)))
    assert touched == [LARGE_RESULTS if section in ("write", "hopfield") else 0]


def test_ratio_is_taken_within_each_round():
    rounds = Rounds({"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 3.0]})
    assert rounds.ratio("a", "b") == Spread(median=1.0, low=0.75, high=1.5)
    assert rounds.fastest("a", "b") == "a"


def test_difference_is_taken_within_each_round():
    rounds = Rounds({"both": [3.0, 30.0], "forward": [1.0, 10.0]}).with_difference("backward", "both", "forward")
    assert rounds.seconds["backward"] == [2.0, 20.0]


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (Target(">=", 2, 3), 2.0, "met"),
        (Target(">=", 2, 3), 1.99, "MISSED"),
        (Target("<=", 1.2), 1.2, "met"),
        (Target("<=", 1.2), 1.21, "MISSED"),
        (None, 1.0, ""),
    ],
)
def test_verdict_follows_the_gate(target, value, verdict):
    row = Row("what", Spread(value, value, value), target)
    assert row.verdict == verdict == row.record()["verdict"]
    assert row.markdown().count("|") == 9


def test_sum_is_taken_within_each_round():
    rounds = Rounds({"products": [3.0, 30.0], "pages": [1.0, 10.0]}).with_sum("limit", "products", "pages")
    assert rounds.seconds["limit"] == [4.0, 40.0]


def test_limit_tells_the_share_that_is_reached():
    limit = Limit("reading, 20.0 GB/s", Spread(0.75, 0.7, 0.8))
    row = Row("what", Spread(4.0, 3.0, 5.0), Target(">=", 5), "15.0 GB/s", limit)
    assert "| 75 % of reading, 20.0 GB/s |" in row.markdown() and "75 % of reading" in row.plain()
    assert row.record()["limit"]["fraction"]["median"] == 0.75


def test_operations_of_the_retrieval_are_those_of_its_products():
    # T = 3, E = 5, M = 2: products of 60 operations with the patterns, of 24 with their Gram matrix, 6 exponentials.
    assert retrieval_flops(3, 5, 2, 1, backward=False) == 2 * 60 + 6 * EXP_FLOPS
    assert retrieval_flops(3, 5, 2, 4, backward=False) == 2 * 60 + 3 * 24 + 24 * EXP_FLOPS
    assert retrieval_flops(3, 5, 2, 4, backward=True) == 5 * 60 + 9 * 24 + 24 * EXP_FLOPS


def test_fresh_pages_are_all_touched_and_given_back():
    peak = peak_bytes(lambda: fresh_pages(64 << 20))
    if peak is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    assert 60 << 20 < peak < 80 << 20
    assert read_all(torch.tensor([[1.0, 3.0], [2.0, 0.0]])) == 6


def test_peak_memory_counts_what_is_freed_before_the_end():
    def allocate_and_free() -> None:
        torch.ones(32 << 20)  # 128 MiB

    peak = peak_bytes(allocate_and_free)
    if peak is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    assert 120 << 20 < peak < 160 << 20


@pytest.mark.parametrize("measure", [write_extra_bytes, select_extra_bytes])
def test_memory_is_what_the_lists_and_the_balance_loss_take(measure):
    shape = Shape(tokens=8192, dim=256, k=512)
    extra = in_own_process(measure, shape, 1)
    if extra is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    lists = 128 * 2 * 512 * (4 + 4)  # at least one block of rows, twice k candidates each
    assert lists < extra < 16 << 20


def test_hard_distributions_are_what_their_names_say():
    logits = distributions(64, 2)
    assert logits["ascending"].diff(dim=0).min() > 0 > logits["descending"].diff(dim=0).max()
    assert (logits["equal high bits"].view(torch.int32) >> 12).unique().numel() <= 2
    assert 0 < logits["denormal"].max() < torch.finfo(torch.float32).tiny
    assert logits["NaN"].isnan().all() and (logits["one giant"] > 0).sum() == 2


def test_every_section_named_in_the_defaults_exists():
    assert set(Config().sections) == set(SECTIONS)


def test_sweep_writes_points_table_and_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep, "SWEEPS", {"tokens": (32, 64), "k": (4, 8), "num_slots": (2, 4), "dim": (8, 16)})
    base = Shape(tokens=48, dim=12, num_slots=3, slot_dim=4, num_heads=2, k=6)
    sweep.main(sweep.Config(out=tmp_path / "sweep", rounds=1, base=base))
    points = json.loads((tmp_path / "sweep.json").read_text())["sweeps"]
    assert [point["value"] for point in points["tokens"]] == [32, 64]
    for point in (point for row in points.values() for point in row):
        seconds, ratio = point["seconds"], point["ratios"]["batched"]["median"]
        assert ratio == pytest.approx(seconds["batched"]["median"] / seconds["ait"]["median"])
    rows = (tmp_path / "sweep.md").read_text().splitlines()
    assert len(rows) == 4 + 8 and rows[4].startswith("| tokens T = 32 |") and rows[4].count("|") == 6
    assert (tmp_path / "sweep.svg").read_text().rstrip().endswith("</svg>")
