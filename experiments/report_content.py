"""What a run's folder holds, read and checked for its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from look_inside import MEMORY, RECORDING
from report_figures import shortened
from results import read_result
from run_folder import load_checkpoint
from torch import Tensor

from ait.recording import MemoryHistory, Trace
from ait.recording.files import ZIP_DAMAGES

METRICS = {
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "balance_loss",
    "validation_loss",
    "validation_accuracy",
    "images_per_second",
    "seconds",
}


@dataclass(frozen=True)
class Mistakes:
    """What ``mistakes.npz`` holds; ``n`` images, worst first."""

    images: np.ndarray  # (n, C, H, W) uint8
    labels: np.ndarray  # (n,)
    predictions: np.ndarray  # (n,)
    probabilities: np.ndarray  # (n,), of the wrong answer
    classes: list[str]
    split: str
    captions: list[str] | None
    confusion: np.ndarray | None  # (classes, classes)


@dataclass(frozen=True)
class Memory:
    """The slots of a layer."""

    layer: str
    gamma: np.ndarray  # (M, D)
    skipped_updates: int

    @property
    def cosines(self) -> np.ndarray:
        """Cosine similarity of every two slots, ``(M, M)``; zero for a slot that is zero."""
        rows = self.gamma / np.maximum(np.linalg.norm(self.gamma, axis=1, keepdims=True), 1e-30)
        return rows @ rows.T

    @property
    def effective_slots(self) -> float:
        """The effective rank: exp of the entropy of the singular values over their sum, from 1 to ``min(M, D)``.

        Source: O. Roy, M. Vetterli, The effective rank, EUSIPCO 2007.
        """
        values = np.linalg.svd(self.gamma, compute_uv=False)
        values = values[values > 0] / max(values.sum(), 1e-30)
        return math.exp(-(values * np.log(values)).sum())


@dataclass
class RunContent:
    """What was read from a run's folder."""

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    last_written: datetime | None  # when metrics.jsonl was
    result: dict[str, Any] | None  # None: not finished
    environment: dict[str, Any]
    checkpoint: dict[str, Any] | None
    memories: list[Memory]
    mistakes: Mistakes | None
    recording: Trace | None
    history: MemoryHistory | None
    notes: list[str] = field(default_factory=list)  # what is amiss, for the reader

    @property
    def kept_epoch(self) -> int | None:
        """The epoch whose weights are kept: of those with the best validation accuracy, the last."""
        if self.result is not None and "kept_epoch" in self.result:
            return self.result["kept_epoch"]
        best = max(self.lines, key=lambda line: (line["validation_accuracy"], line["epoch"]), default=None)
        return None if best is None else best["epoch"]


def read_run(folder: Path) -> RunContent:
    """Reads a run's folder.

    Raises:
        FileNotFoundError, ValueError, OSError: as :func:`write_report`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"report: expected the folder of a run, got {folder}, which is no folder")
    config = read_config(folder / "config.json")
    notes: list[str] = []
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics, notes)
    last_written = datetime.fromtimestamp(metrics.stat().st_mtime).astimezone() if lines else None
    result = checked_result(folder / "result.json") if (folder / "result.json").exists() else None
    environment = _optional(folder / "environment.json", read_object, notes) or {}
    if result is not None:
        environment = {**result["environment"], "git_revision": result.get("git_revision")} | environment
    checkpoint = _optional(folder / "checkpoint.pt", load_checkpoint, notes)
    memories = read_memories(checkpoint["state_dict"], notes) if checkpoint is not None else []
    mistakes = _optional(folder / "mistakes.npz", read_mistakes, notes)
    recording = _optional(folder / RECORDING, Trace.load, notes)
    history = _optional(folder / MEMORY, MemoryHistory.load, notes)
    extras = (checkpoint, memories, mistakes, recording, history)
    return RunContent(folder.absolute().name, config, lines, last_written, result, environment, *extras, notes)


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"report: expected a run's {path.name}, got no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"report: expected {path} to hold a JSON object, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"report: expected {path} to hold a JSON object, got {type(content).__name__}")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Reads the options of a run; raises as :func:`read_object`."""
    config = read_object(path)
    for name in ("model", "data"):
        if not isinstance(config.get(name), str):
            raise ValueError(f"report: expected {path} to name the {name}, got {config.get(name)!r}")
    if type(config.get("epochs")) is not int or config["epochs"] < 1:
        raise ValueError(f"report: expected {path} to have epochs of at least 1, got {config.get('epochs')!r}")
    return config


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Reads one line an epoch; a last one that was cut off while it was written is left out, and noted.

    Args:
        path: of ``metrics.jsonl``; a run whose first epoch goes on has none.
        notes: receives a sentence.

    Raises:
        ValueError: a line is no JSON object with numbers for all of ``METRICS``.
    """
    if not path.exists():
        return []
    epochs: dict[int, dict[str, Any]] = {}
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for index, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if index == len(texts) and text.startswith("{"):  # no newline follows
                notes.append(f"The last line of {path.name} is half written, and left out.")
                break
            raise ValueError(f"report: expected {path}, line {index}, to be a JSON object, got: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"report: expected {path}, line {index}, to be a JSON object, got {text[:40]!r}")
        wrong = sorted(name for name in METRICS if not is_number(line.get(name)))
        if wrong:
            raise ValueError(f"report: expected {path}, line {index}, to have numbers for {', '.join(wrong)}")
        if type(line["epoch"]) is not int or line["epoch"] < 1:
            raise ValueError(f"report: expected {path}, line {index}, to be of an epoch, got {line['epoch']!r}")
        epochs[line["epoch"]] = line
    return [epochs[epoch] for epoch in sorted(epochs)]


def checked_result(path: Path) -> dict[str, Any]:
    """Reads ``result.json``, and verifies what is shown of it.

    Raises:
        ValueError: it is something else.
    """
    result = read_result(path)

    def check(is_right: bool, what: str) -> None:
        if not is_right:
            raise ValueError(f"report: expected {path} to have {what}")

    for name in ("test_accuracy", "validation_accuracy", "parameters", "images_per_second", "seconds", "epochs"):
        check(is_number(result[name]), f"a number for {name}, got {result[name]!r}")
    check(_is_interval(result["test_interval_95"]), "two numbers for test_interval_95")
    check(isinstance(result["environment"], dict), "an object for environment")
    check("kept_epoch" not in result or type(result["kept_epoch"]) is int, "a whole number for kept_epoch")
    if "confusion" in result:
        try:
            result["confusion"] = _checked_confusion(np.array(result["confusion"]))
        except ValueError as error:
            raise ValueError(
                f"report: expected {path} to have a square of counts for confusion, got: {error}"
            ) from error
    kinds = result.get("test_by_kind", {})
    check(isinstance(kinds, dict), "an object for test_by_kind")
    for kind, each in kinds.items():
        check(
            isinstance(each, dict)
            and all(is_number(each.get(name)) for name in ("correct", "total", "accuracy"))
            and _is_interval(each.get("interval_95")),
            f"correct, total, accuracy and interval_95 for {kind!r} of test_by_kind",
        )
    return result


def read_memories(state: Mapping[str, Any], notes: list[str]) -> list[Memory]:
    """The memories among a model's weights; one that cannot be shown is noted."""
    memories = []
    for name, gamma in state.items():
        if not str(name).endswith("memory.gamma"):
            continue
        skipped = torch.as_tensor(state.get(name.removesuffix("gamma") + "skipped_updates", 0))
        is_matrix = isinstance(gamma, Tensor) and gamma.dim() == 2 and gamma.numel() > 0
        if not is_matrix or not gamma.isfinite().all() or skipped.numel() != 1:
            notes.append(
                f"checkpoint.pt: {name} is not shown; expected finite slots (M, D) and one count of skipped writes."
            )
            continue
        layer = name.removesuffix(".gamma").removesuffix(".memory")
        memories.append(Memory(layer, gamma.double().numpy(), int(skipped)))
    return memories


def read_mistakes(path: Path) -> Mistakes:
    """Reads ``mistakes.npz``.

    Raises:
        ValueError: it is damaged, or not as :class:`Mistakes` says.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, *ZIP_DAMAGES) as error:
        raise ValueError(f"expected a NumPy archive without pickles, got: {error}") from error
    missing = {"images", "labels", "predictions", "probabilities", "classes", "split"} - arrays.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    images, classes = arrays["images"], [str(name) for name in arrays["classes"].ravel()]
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3) or 0 in images.shape[1:]:
        raise ValueError(f"expected images (n, 1 or 3, H, W) of uint8, got {images.shape} of {images.dtype}")
    for name in ("labels", "predictions", "probabilities"):
        if arrays[name].shape != images.shape[:1] or arrays[name].dtype.kind not in (
            "iu" if name != "probabilities" else "f"
        ):
            raise ValueError(f"expected {name} ({len(images)},), got {arrays[name].shape} of {arrays[name].dtype}")
    named = np.concatenate([arrays["labels"], arrays["predictions"]])
    if named.size and not 0 <= named.min() <= named.max() < len(classes):
        raise ValueError(f"expected labels and predictions in [0, {len(classes)}), got others")
    captions = None
    if "captions" in arrays:
        if arrays["captions"].shape != images.shape[:1]:
            raise ValueError(f"expected captions ({len(images)},), got {arrays['captions'].shape}")
        captions = [str(caption) for caption in arrays["captions"]]
    confusion = None
    if "confusion" in arrays:
        confusion = _checked_confusion(arrays["confusion"])
        if len(confusion) != len(classes):
            raise ValueError(f"expected a confusion matrix of {len(classes)} classes, got {len(confusion)}")
    return Mistakes(
        images,
        arrays["labels"],
        arrays["predictions"],
        arrays["probabilities"],
        classes,
        str(arrays["split"]),
        captions,
        confusion,
    )


def _optional(path: Path, read: Any, notes: list[str]) -> Any:
    """What ``read`` makes of a file; None where there is none, and None and a note where it is damaged."""
    if not path.exists():
        return None
    try:
        return read(path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        notes.append(f"{path.name} is damaged, and left out: {shortened(str(error), 200)}")
        return None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


def _checked_confusion(counts: np.ndarray) -> np.ndarray:
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size or counts.dtype.kind not in "iu":
        raise ValueError(f"expected a square of counts, got {counts.shape} of {counts.dtype}")
    if counts.min() < 0:
        raise ValueError(f"expected counts of at least 0, got {counts.min()}")
    return counts.astype(np.int64)
