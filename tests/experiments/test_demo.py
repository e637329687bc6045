"""The demo: both models trained on digits, a table, and a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tyro")

import torch
import train as train_module
from demo import DemoConfig, run, table


def test_both_models_are_trained_and_drawn_and_a_second_demo_replaces_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train_module.load_images

    def few_images(*arguments: Any, **options: Any) -> Any:
        splits = real(*arguments, **options)
        return dataclasses.replace(splits, train=splits.train.split(0.1)[1])

    monkeypatch.setattr(train_module, "load_images", few_images)
    threads = torch.get_num_threads()
    try:
        for _ in range(2):
            picture = run(DemoConfig(out=tmp_path, epochs=1), progress=False)
    finally:
        torch.set_num_threads(threads)
    image_module = pytest.importorskip("PIL.Image")
    with image_module.open(picture) as image:
        assert min(image.size) > 1000 and image.format == "PNG"
        assert len(image.convert("RGB").resize((200, 200)).getcolors(40_000)) > 100  # something is drawn
    output = capsys.readouterr().out
    assert "ait_tiny" in output and "vit_tiny" in output and "95 % interval" in output
    assert "ait_tiny less vit_tiny: " in output and "of 360 right in the first alone" in output
    assert str(picture) in output
    assert all((tmp_path / model / "result.json").is_file() for model in ("ait_tiny", "vit_tiny"))


def test_table_is_aligned() -> None:
    result = {"parameters": 668018, "test_interval_95": (0.93, 0.97), "images_per_second": 1200.4, "seconds": 61.0}
    lines = table([{"model": model, "test_accuracy": 0.95, **result} for model in ("ait_tiny", "vit_tiny")]).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["ait_tiny", "668,018", "95.0", "%", "93.0", "to", "97.0", "1,200", "61"]


def test_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="expected an output folder that can be written"):
        run(DemoConfig(out=tmp_path / "file"), progress=False)
