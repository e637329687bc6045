"""experiments/transfer.py: four arms on noise, what learns in each, going on, learning rates, the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.experiments.tiny import write_tiny_cifar

pytest.importorskip("peft")
pytest.importorskip("safetensors")

import transfer
from transfer import ARMS, Config, chosen_lr, make_model, read, table


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("transfer")
    config = Config(
        data_dir=write_tiny_cifar(folder / "data", num_classes=100),
        out=folder / "out",
        lrs=(1e-4, 1e-3),
        seeds=(0, 1),
        epochs=1,
        train_images=32,
        validation_images=4,
        test_images=20,
        batch_size=16,
    )
    transfer.transfer(config)
    return config


def test_each_arm_trains_what_its_name_says_from_the_same_classifier() -> None:
    heads, kinds = [], {}
    for arm in ARMS:
        model = make_model(Config(), arm, seed=3)
        heads.append(next(p for name, p in model.named_parameters() if name.endswith("head.weight")).detach().clone())
        kinds[arm] = {kind for kind, count in transfer.count_trained(model).items() if count}
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert all("head." in name or "lora_" in name or "global_workspace" in name for name in trained)
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert kinds == {
        "head": {"head"},
        "lora": {"head", "lora"},
        "workspace": {"head", "workspace"},
        "lora-workspace": {"head", "lora", "workspace"},
    }


def test_trials_leave_the_test_set_alone_and_runs_record_it(finished: Config) -> None:
    trials, runs = read(finished, is_trial=True), read(finished, is_trial=False)
    assert len(trials) == len(ARMS) * 2 and len(runs) == len(ARMS) * 2
    assert not any(name.startswith("test") for trial in trials for name in trial)
    for run in runs:
        assert run["test_images"] == 20 and run["lr"] == chosen_lr(finished, run["arm"])
        assert run["test_interval_95"][0] <= run["test_accuracy"] <= run["test_interval_95"][1]


def test_it_goes_on_where_it_stopped_and_with_the_same_numbers(finished: Config) -> None:
    path = finished.out / "workspace-1.json"
    before = {each: each.stat().st_mtime_ns for each in finished.out.iterdir() if each != path}
    content = json.loads(path.read_text())
    path.unlink()
    transfer.transfer(finished)
    assert {each: each.stat().st_mtime_ns for each in before} == before
    again = json.loads(path.read_text())
    timing = ("seconds", "images_per_second", "git_revision")
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in content.items() if k not in timing}


def test_another_budget_in_the_same_folder_is_refused(finished: Config) -> None:
    with pytest.raises(ValueError, match=r"transfer: expected the budget of trial-head-0\.0001\.json"):
        transfer.transfer(dataclasses.replace(finished, epochs=2))
    with pytest.raises(ValueError, match="expected arms among head, lora"):
        transfer.transfer(dataclasses.replace(finished, arms=("heads",)))


def test_the_learning_rate_is_that_of_the_best_trial_and_of_equal_ones_the_lower(tmp_path: Path) -> None:
    config = Config(out=tmp_path)
    for lr, accuracy in ((3e-4, 0.2), (1e-3, 0.3), (3e-3, 0.3)):
        trial = {"arm": "lora", "lr": lr, "validation_accuracy": accuracy, "is_trial": True}
        (tmp_path / f"trial-lora-{lr:g}.json").write_text(json.dumps(trial))
    assert chosen_lr(config, "lora") == 1e-3


def test_the_table_has_a_line_for_each_arm_run_and_pair(finished: Config) -> None:
    lines = table(read(finished, is_trial=True), read(finished, is_trial=False)).splitlines()
    for arm in ARMS:
        assert sum(line.startswith(f"| {arm} |") for line in lines) == 2
        assert sum(line.startswith(f"| {arm}-") for line in lines) >= 2
    assert sum(line.startswith("- ") for line in lines) == 6
