"""Associative recall: the theory is the published one, and a small run writes what it says."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
import recall


@pytest.mark.parametrize("z", [1e-6, 0.1, 1.0, math.e, 50.0, 1e6])
def test_lambert_w_inverts_w_times_exp_w(z: float) -> None:
    w = recall.lambert_w(z)
    assert w > 0 and w * math.exp(w) == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("dim, k, c", [(20, 3.0, 3.1546), (75, 1.0, 1.3718)])
def test_theorem_3_gives_the_two_constants_that_its_authors_print(dim: int, k: float, c: float) -> None:
    assert recall.theorem_3_c(dim, beta=1.0, p=0.001, k=k) == pytest.approx(c, abs=1e-4)


def test_theorem_3_promises_nothing_where_its_condition_fails() -> None:
    assert recall.theorem_3(16, beta=0.25, p=0.05) is None
    assert recall.theorem_3(32, beta=4.0, p=0.05) == pytest.approx(28.92, abs=0.01)


def test_theorem_5_bounds_every_error_and_its_separation_is_the_smallest() -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = recall.sphere(32, 16, math.sqrt(15), generator)
    wanted = torch.arange(32)
    queries = patterns + recall.sphere(32, 16, 0.3, generator)
    for beta in (8.0, 2.0, 0.5):
        separation, bound = recall.theorem_5(patterns, wanted, queries, beta)
        error = (recall.update(queries, patterns, beta) - patterns).norm(dim=-1)
        assert bool((error <= bound).all())
        gram = patterns @ patterns.T
        expected = [float(15 - max(gram[i, j] for j in range(32) if j != i)) for i in range(32)]
        assert separation.tolist() == pytest.approx(expected)
    assert float((error / bound).max()) > 1e-9  # a bound, and not infinity


def test_a_small_run_writes_numbers_and_figures_that_a_second_run_repeats(tmp_path) -> None:
    first = recall.main(tmp_path / "a", recall.QUICK)
    second = recall.main(tmp_path / "b", recall.QUICK)
    assert first == second
    names = {"recall.json", "capacity.svg", "digits.svg", "energy.svg", "error.svg"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    content = json.loads((tmp_path / "a" / "recall.json").read_text())
    assert len(content["capacity"]) == 2 * 4 and content["digits"]["asked"] == 10
    for entry in content["capacity"]:
        assert 0 <= entry["promised_by_theorem_5"] <= entry["retrieved"] <= entry["queries"]


def test_the_figures_that_are_kept_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in recall.RESULTS.glob("*.svg")}
    assert len(sizes) == 4 and max(sizes.values()) < 60_000, sizes
