"""The folder of a run: whether it may be used, and the checkpoint in it."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "result.json", "events.out.tfevents.*")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that has files in it or cannot be written, and leaves nothing behind.

    Raises:
        FileExistsError: it has files, and ``overwrite`` is False.
        OSError: nothing can be written there.
    """
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"train: expected a new or empty folder, got {folder}, which has files; see --overwrite")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"train: expected an output folder that can be written, got {folder}: {error}") from error


def prepare_folder(folder: Path) -> None:
    """Makes the folder, and removes the files of the run that is replaced; any other file stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def save_checkpoint(folder: Path, model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Writes ``checkpoint.pt``, never half of it: the state dict, and beside it ``facts``, of plain types.

    ``torch.load(..., weights_only=True)`` reads it, and ``ait.create_model`` makes the model again from the facts
    ``"model"`` and ``"model_arguments"``.
    """
    temporary = folder / "checkpoint.pt.tmp"
    torch.save({"state_dict": model.state_dict(), **facts}, temporary)
    os.replace(temporary, folder / "checkpoint.pt")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_checkpoint` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"train: no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"train: expected {path} to be a checkpoint of train.py, got: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"train: expected {path} to be a checkpoint of train.py, got a file without 'state_dict'")
    return content


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a checkpoint's weights into a model of the same shape.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_checkpoint`; ValueError too, naming the differences, where the
            checkpoint is of another model.
    """
    theirs, ours = load_checkpoint(path)["state_dict"], model.state_dict()
    differences = [f"it lacks {name}" for name in ours if name not in theirs]
    differences += [f"{name} is unknown here" for name in theirs if name not in ours]
    differences += [
        f"{name} is {tuple(theirs[name].shape)} there and {tuple(ours[name].shape)} here"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    if differences:
        shown = "; ".join(differences[:6]) + ("; ..." if len(differences) > 6 else "")
        raise ValueError(f"train: expected {path} to be of the same model, got {len(differences)} differences: {shown}")
    model.load_state_dict(theirs)
