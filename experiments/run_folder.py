"""The folder of a run: whether it may be used, what is written there, and never half of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RUN_FILES = (
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "last.pt",
    "mistakes.npz",
    "recording.npz",
    "memory.npz",
    "result.json",
    "report.html",
    "events.out.tfevents.*",
    "*.tmp",
    ".*.partial",
)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that has files in it or cannot be written, and leaves nothing behind.

    Raises:
        FileExistsError: it has files, and ``overwrite`` is False.
        OSError: nothing can be written there.
    """
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"train: expected a new or empty folder, got {folder}, which has files; see --overwrite and --resume"
        )
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


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Writes a file under another name, brings it to the disk, and puts it in the place of the old one.

    Args:
        path: of the file; what stood there stays, whole, if anything goes wrong.
        write: called with a binary file to write to.

    Raises:
        OSError: nothing can be written, or the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = f"; what was saved there before stays: {path}" if path.exists() else ""
        raise OSError(f"cannot write {path.name}: {error}{kept}") from error


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint with its SHA-256, never half of it; ``torch.load(..., weights_only=True)`` reads it.

    Args:
        path: of the file.
        content: ``"state_dict"`` and whatever belongs to it: dicts, lists, tensors and plain types.

    Raises:
        OSError: as :func:`write_atomically`.
    """
    # Through memory, since torch.save itself reports a full disk as a RuntimeError without a name.
    buffer = io.BytesIO()
    torch.save({**content, "sha256": digest(content)}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_checkpoint` wrote, and verifies its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or was altered.
    """
    if not path.is_file():
        raise FileNotFoundError(f"train: no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"train: expected {path} to be a checkpoint of train.py, got: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"train: expected {path} to be a checkpoint of train.py, got a file without 'state_dict'")
    expected = content.pop("sha256", None)
    if expected is not None and digest(content) != expected:  # checkpoints of version 0.1.0 have none
        raise ValueError(f"train: expected {path} to have the SHA-256 that it states, {expected}, got another content")
    return content


def digest(content: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain types, the same after saving and loading."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            sha.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
            sha.update(value.view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            sha.update(f"dict {len(value)} ".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            sha.update(f"list {len(value)} ".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{type(value).__name__} {value!r} ".encode())

    add(content)
    return sha.hexdigest()


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


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an ``.npz`` file atomically."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Adds a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def keep_lines(path: Path, epochs: int) -> None:
    """Drops the lines of later epochs than ``epochs``, and a last line that was cut off while it was written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = [line for line in text.split("\n")[:-1] if line]  # what follows the last newline is no line
    kept = [line + "\n" for line in whole if json.loads(line)["epoch"] <= epochs]
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
