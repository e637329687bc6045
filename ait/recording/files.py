"""Traces as files: all tensors under short keys, everything else as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ait.ops._checks import op_error
from ait.recording.trace import AttentionRecord, LayerRecord, Pass, Trace, WriteRecord

FORMAT = "ait-trace-1"
META = "ait"
# What reading a damaged archive raises; NotImplementedError is zipfile's, for a way of compression it does not know.
ZIP_DAMAGES = (zipfile.BadZipFile, zlib.error, NotImplementedError)
DAMAGES = (KeyError, TypeError, ValueError, AttributeError, EOFError, *ZIP_DAMAGES)
CLASSES: dict[str, type] = {each.__name__: each for each in (Trace, Pass, LayerRecord, WriteRecord, AttentionRecord)}


def save_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """See :meth:`Trace.save <ait.recording.Trace.save>`."""
    tensors: dict[str, Tensor] = {}
    meta = json.dumps({"format": FORMAT, "trace": _pack(trace, tensors)})
    write_tensors("Trace.save", Path(path), tensors, meta)


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """See :meth:`Trace.load <ait.recording.Trace.load>`."""
    tensors, meta = read_tensors("Trace.load", Path(path))
    try:
        content = json.loads(meta)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        trace = _unpack(content["trace"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise op_error("Trace.load", f"a file that Trace.save wrote ({FORMAT})", f"{path}: {error!r}") from error
    if not isinstance(trace, Trace):
        raise op_error("Trace.load", "a trace", f"{path}, which holds a {type(trace).__name__}")
    return trace


def write_tensors(caller: str, path: Path, tensors: dict[str, Tensor], meta: str) -> None:
    """Writes tensors and a string to ``path``, whole or not at all."""
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save: Callable[[Path], None] = functools.partial(
            _safetensors(caller).torch.save_file, on_cpu, metadata={META: meta}
        )
    elif path.suffix == ".npz":
        save = functools.partial(_save_arrays, on_cpu, meta)
    else:
        raise op_error(caller, "a path that ends in .npz or .safetensors", path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{caller}: expected a file in a folder that is there, got {path}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(caller: str, path: Path) -> tuple[dict[str, Tensor], str]:
    """Reads what :func:`write_tensors` wrote."""
    if path.suffix not in (".npz", ".safetensors"):
        raise op_error(caller, "a path that ends in .npz or .safetensors", path)
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: expected a file, got {path}")
    safetensors = _safetensors(caller) if path.suffix == ".safetensors" else None
    try:
        if safetensors is None:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            meta = str(arrays.pop(META))
            return {key: torch.from_numpy(array) for key, array in arrays.items()}, meta
        with safetensors.safe_open(path, framework="pt") as file:
            meta = (file.metadata() or {})[META]
        return safetensors.torch.load_file(path), meta
    except DAMAGES as error:
        raise op_error(caller, "a file that ait wrote", f"{path} ({error})") from error
    except Exception as error:
        if safetensors is None or not isinstance(error, safetensors.SafetensorError):
            raise
        raise op_error(caller, "a file that ait wrote", f"{path} ({error})") from error


def _save_arrays(tensors: dict[str, Tensor], meta: str, path: Path) -> None:
    # NumPy has no bfloat16; the dtype to come back to stands in ``meta``.
    arrays: dict[str, Any] = {
        key: (each.float() if each.dtype == torch.bfloat16 else each).numpy() for key, each in tensors.items()
    }
    arrays[META] = np.array(meta)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _safetensors(caller: str) -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        cure = "pip install 'associative-transformer[pretrained]', or use a path that ends in .npz"
        raise ImportError(f"{caller}: cannot import safetensors ({error}); {cure}", name="safetensors") from error
    return safetensors


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key, "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [_pack(each, tensors) for each in value]
    if isinstance(value, dict):
        return {"dict": [[key, _pack(each, tensors)] for key, each in value.items()]}
    if dataclasses.is_dataclass(value):
        fields = {each.name: _pack(getattr(value, each.name), tensors) for each in dataclasses.fields(value)}
        return {"class": type(value).__name__, "fields": fields}
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].to(getattr(torch, value["dtype"]))
    if "dict" in value:
        return {key: _unpack(each, tensors) for key, each in value["dict"]}
    fields = {name: _unpack(each, tensors) for name, each in value["fields"].items()}
    for name in ("shape", "grid"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    return CLASSES[value["class"]](**fields)
