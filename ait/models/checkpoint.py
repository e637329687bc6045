"""Files of weights: safetensors with the model's config in the header, and PyTorch's pickles, whose code never runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Key of the config, as JSON, in the metadata of a safetensors file.
CONFIG_KEY = "ait_config"
CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"

_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, which stands for the file that 'git lfs pull' fetches"),
    (b"<", "an HTML or XML page, as downloads are that did not reach the file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x80", "a pickle, as torch.save once wrote"),
)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes a state dict, and its config in the header, to one file: whole, or not at all.

    Tensors that share storage are written once each, and are apart when they are read.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written; one that stood there is as it was.
    """
    _require_safetensors()
    import safetensors.torch

    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone(memory_format=torch.contiguous_format)
        storages.add(plain.untyped_storage().data_ptr())
        apart[name] = plain
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config, sort_keys=True)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        safetensors.torch.save_file(apart, whole, metadata=metadata)
        # safetensors may make files that their owner alone can read; these get the mode of any new file.
        ordinary = Path(folder) / "ordinary"
        ordinary.touch()
        whole.chmod(ordinary.stat().st_mode)
        os.replace(whole, path)


def read_safetensors(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The config (None where the header has none) and the state dict of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, or another kind of file.
        ImportError: safetensors is not installed.
    """
    _require_safetensors()
    import safetensors

    _check_is_file(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        found = _describe(path) or f"one that is truncated or altered ({error})"
        raise ValueError(f"weights: {path}: expected a safetensors file, got {found}") from error
    if CONFIG_KEY not in metadata:
        return None, tensors
    return parse_config(metadata[CONFIG_KEY], f"{path}, {CONFIG_KEY} in its header"), tensors


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, strings and containers of these, on the CPU.

    Read with ``weights_only=True``: a pickle that calls anything is refused, and what it calls is not called.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, another kind of file, or holds more than tensors.
    """
    _check_is_file(path)
    try:
        with warnings.catch_warnings():
            # Of unusual pickle protocols: what cannot be read is an error anyway.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises about anything on bytes that are no checkpoint
        expected = f"weights: {path}: expected a checkpoint of torch.save, tensors alone"
        cure = ""
        if _refused_by_unpickler(error):
            cure = (
                ". Reading more than tensors runs code of the file's author: where you trust it, load it there with "
                "weights_only=False and save model.state_dict() alone"
            )
        raise ValueError(f"{expected}, got {why_unreadable(path, error)}{cure}") from error


def why_unreadable(path: Path, error: Exception) -> str:
    """What a file is, in which ``torch.load(weights_only=True)`` did not find tensors, without that one's advice."""
    if called := _refused_by_unpickler(error):
        return f"one that refers to {called}, which was not executed"
    if "TorchScript" in str(error):
        return "a TorchScript program, which holds code"
    found = _describe(path)
    if found is None or found.startswith(("a zip", "a pickle")):
        found = f"one that is truncated or altered ({_reason(error)})"
    return found


def is_state_dict(value: Any) -> bool:
    """Whether it maps names to tensors."""
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the state dict of a folder that ``save_pretrained`` wrote, or of a clone of a repository.

    Raises:
        FileNotFoundError: it lacks ``config.json``, or has neither ``model.safetensors`` nor ``pytorch_model.bin``.
        ValueError: a file is no such file, or no whole one.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    config_file = folder / CONFIG_FILE
    weights_file = next((folder / name for name in (SAFETENSORS_FILE, PICKLE_FILE) if name in names), None)
    if not config_file.is_file() or weights_file is None:
        expected = f"{CONFIG_FILE} and {SAFETENSORS_FILE} (or {PICKLE_FILE})"
        raise FileNotFoundError(f"weights: {folder}: expected {expected}, got {', '.join(names[:8]) or 'no files'}")
    return read_config(config_file), read_weights_file(weights_file)


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``.safetensors`` file or, by any other name, of a pickle; errors as those raise."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[1]
    tensors = read_pickle(path)
    if not is_state_dict(tensors):
        raise ValueError(f"weights: {path}: expected a state dict, names and tensors, got {type(tensors).__name__}")
    return dict(tensors)


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it holds none."""
    try:
        return parse_config(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"weights: {path}: expected JSON, got {error}") from error


def parse_config(text: str, where: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"weights: {where}: expected JSON, got {text[:40]!r} ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"weights: {where}: expected a JSON object, got {text[:40]!r}")
    return config


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """How the names and shapes of a model's state dict, ``ours``, differ from those of weights; a sentence each."""
    missing = [f"the weights lack {name}" for name in ours if name not in theirs]
    unexpected = [f"the model lacks {name}" for name in theirs if name not in ours]
    return missing + unexpected + shape_differences(ours, theirs)


def shape_differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """The same for the shapes of the tensors that both have."""
    return [
        f"{name} is {tuple(theirs[name].shape)} in the weights and {tuple(ours[name].shape)} in the model"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ]


def shorten(sentences: list[str]) -> str:
    return f"{len(sentences)} differences: " + "; ".join(sentences[:6]) + ("; ..." if len(sentences) > 6 else "")


def _require_safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        cure = "pip install 'associative-transformer[hf]'"
        raise ImportError(f"weights: cannot import safetensors ({error}); {cure}", name="safetensors") from error


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"weights: {path}: expected a file, got a folder")
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}")


def _refused_by_unpickler(error: Exception) -> str | None:
    """The function or class for which PyTorch's unpickler refused a file, if that was the reason."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"(?:GLOBAL|unrecognized function) (\S+)", str(error))
    return found[1] if found else None


def _describe(path: Path) -> str | None:
    """What a file seems to be by its first bytes, if they tell."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "an empty file"
    return next((description for signature, description in _SIGNATURES if start.startswith(signature)), None)


def _reason(error: Exception) -> str:
    """One line of an error of torch.load, without its advice."""
    if isinstance(error, pickle.UnpicklingError):
        text = str(error).rpartition("error:")[2].strip()
    else:
        text = f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:200] if text else type(error).__name__
