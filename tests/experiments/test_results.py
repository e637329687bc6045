"""Intervals, the table of results, and what is said of two runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import results
from results import (
    REQUIRED,
    comparison,
    environment,
    git_revision,
    intervals_overlap,
    markdown_table,
    pack_right,
    paired_difference,
    read_result,
    unpack_right,
    wilson_interval,
    write_json,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17, 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(1, 2), (342, 360), (7150, 10000), (1, 1000)])
def test_wilson_bounds_are_the_shares_that_the_score_test_just_accepts(correct: int, total: int) -> None:
    share = correct / total
    for bound in wilson_interval(correct, total):
        score = (share - bound) / math.sqrt(bound * (1 - bound) / total)
        assert abs(score) == pytest.approx(1.959963984540054, rel=1e-9)


def test_wilson_interval_at_the_ends_is_exact_and_symmetric() -> None:
    assert wilson_interval(0, 7)[0] == 0.0 and wilson_interval(7, 7)[1] == 1.0
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("correct", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_interval_refuses_what_is_no_count(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"got {correct} of {total}"):
        wilson_interval(correct, total)


def _result(run: str, accuracy: float, interval: tuple[float, float], data: str = "cifar10") -> dict[str, Any]:
    return {
        "run": run,
        "model": "ait_tiny",
        "data": data,
        "parameters": 747466,
        "test_accuracy": accuracy,
        "test_interval_95": list(interval),
        "validation_accuracy": 0.7,
        "epochs": 10,
        "images_per_second": 1234.5,
        "seconds": 90.0,
        "environment": {"threads": 1},
    }


def test_overlapping_intervals_show_no_difference_and_apart_they_name_the_better() -> None:
    a, b, c = _result("a", 0.7, (0.6, 0.8)), _result("b", 0.85, (0.8, 0.9)), _result("c", 0.95, (0.91, 0.97))
    assert intervals_overlap(a["test_interval_95"], b["test_interval_95"])  # they touch
    assert comparison(a, b) == "a and b: no difference shown (the 95 % intervals overlap)"
    assert comparison(b, c) == comparison(c, b) == "c is better than b (the 95 % intervals do not overlap)"


def _right(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """What two models got right: both, the first alone, the second alone, none."""
    a = np.repeat([True, True, False, False], [both, first, second, neither])
    b = np.repeat([True, False, True, False], [both, first, second, neither])
    return a, b


@pytest.mark.parametrize("total, shares", [(60, (0.8, 0.1, 0.05)), (360, (0.93, 0.03, 0.02)), (360, (0.5, 0.2, 0.2))])
def test_paired_intervals_hold_the_true_difference_in_95_of_100_samples(
    total: int, shares: tuple[float, float, float]
) -> None:
    generator = np.random.default_rng(0)
    counts = generator.multinomial(total, (*shares, 1 - sum(shares)), size=4000)
    intervals = np.array([paired_difference(*_right(*row))[1:] for row in counts])
    truth = shares[1] - shares[2]
    covered = ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
    # The standard error of 4,000 samples is 0.0034.
    assert 0.94 < covered < 0.97


def test_a_paired_difference_is_antisymmetric_and_knows_what_separate_intervals_do_not() -> None:
    a, b = _right(700, 40, 10, 50)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(30 / 800) and 0 < low < difference < high
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low))
    assert intervals_overlap(wilson_interval(740, 800), wilson_interval(710, 800))
    assert paired_difference(a, a)[0] == 0.0 and paired_difference(a, a)[1] < 0 < paired_difference(a, a)[2]
    assert paired_difference(*_right(0, 3, 0, 0))[2] <= 1
    with pytest.raises(ValueError, match=r"expected the same images twice, got \(3,\) and \(2,\)"):
        paired_difference(a[:3], b[:2])


def test_runs_that_kept_which_answers_were_right_are_compared_image_by_image() -> None:
    runs = []
    for name, right in zip(("a", "b"), _right(700, 40, 10, 50), strict=True):
        share = right.mean()
        kept = {"test_right": pack_right(right), "test_images": right.size}
        assert (unpack_right(kept["test_right"], right.size) == right).all()
        runs.append(_result(name, share, wilson_interval(int(right.sum()), right.size)) | kept)
    a, b = runs
    counts = "on the same images\n(40 of 800 right in the first alone, 10 in the second alone)"
    _, low, high = (100 * value for value in paired_difference(*_right(700, 40, 10, 50)))
    assert (
        comparison(a, b)
        == f"a less b: +3.75 points, 95 % interval {low:.2f} to {high:.2f}, {counts}: a is better on them"
    )
    assert comparison(b, a).endswith("in the second alone): a is better on them") and "b less a: -3.75" in comparison(
        b, a
    )
    assert comparison(a, a).endswith("no difference shown")
    del b["test_right"]
    assert comparison(a, b) == "a and b: no difference shown (the 95 % intervals overlap)"


def test_command_prints_the_table_and_compares_runs_on_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, data in (("a", "cifar10"), ("b", "cifar10"), ("c", "digits")):
        paths.append(tmp_path / f"{name}.json")
        write_json(paths[-1], _result(name, 0.7, (0.6, 0.8), data))
    results.main([str(path) for path in paths])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| a | cifar10 | 747,466 | 10 | 70.00 | 70.00 | 60.00 to 80.00 | 1,234 | 1.5 | 1 |"
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[6:] == ["- cifar10: a and b: no difference shown (the 95 % intervals overlap)."]
    assert markdown_table([]).count("\n") == 1


def test_runs_with_questions_get_a_line_for_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {
        kind: {
            "accuracy": accuracy,
            "interval_95": [accuracy - 0.01, accuracy + 0.01],
            "question_only_accuracy": 0.5,
            "majority_accuracy": 0.25,
        }
        for kind, accuracy in (("non-relational", 0.9), ("relational", 0.625))
    }
    write_json(tmp_path / "a.json", _result("a", 0.7, (0.6, 0.8)) | {"test_by_kind": kinds})
    write_json(tmp_path / "b.json", _result("b", 0.7, (0.6, 0.8)))
    results.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[7] == "| a | non-relational | 90.00 | 89.00 to 91.00 | 50.00 | 25.00 |"
    assert lines[8] == "| a | relational | 62.50 | 61.50 to 63.50 | 50.00 | 25.00 |"
    assert len({line.count("|") for line in lines[5:9]}) == 1 and lines[9] == ""


def test_json_is_one_line_a_key_and_comes_back(tmp_path: Path) -> None:
    content = _result("a", 0.1, (0.0, 0.2))
    write_json(tmp_path / "a.json", content)
    assert (tmp_path / "a.json").read_text().count("\n") == len(content) + 2
    assert read_result(tmp_path / "a.json") == json.loads((tmp_path / "a.json").read_text()) == content


def test_what_is_no_result_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit, match=r"no .*result.json; a run writes it when it has finished"):
        results.main([str(path)])
    for text, got in (("{", "got "), ("[]", "got no"), ('{"run": 1}', "got no data, environment")):
        path.write_text(text)
        with pytest.raises(SystemExit, match=rf"{path}: expected the result.json of a run, {got}"):
            results.main([str(path)])
    with pytest.raises(SystemExit, match="usage"):
        results.main([])


def test_environment_names_the_processor_versions_and_threads() -> None:
    facts = environment()
    assert facts["cpu"] and facts["torch"]["running"] and facts["threads"] >= 1 and facts["kernels"]
    json.dumps(facts)
    assert "environment" in REQUIRED


def test_git_revision_is_a_commit_or_nothing() -> None:
    revision = git_revision()
    assert revision is None or len(revision.rstrip("+")) == 40
