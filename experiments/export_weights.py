"""Writes the weights of a finished run as a safetensors file: what ait/models/weights holds.

    python experiments/export_weights.py runs/cifar10-ait_tiny-0/checkpoint.pt \\
        ait/models/weights/ait_tiny-cifar10.safetensors --data-dir data/cifar10

Floating-point tensors become float16, memories stay float32. The file's metadata says what ait.pretrained_config
returns; the accuracy there is measured here, on the test set, with the rounded weights. The same checkpoint gives the
same file, byte for byte; its SHA-256, which is printed, stands in ait/models/pretrained.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluate import answers_right, model_of
from results import read_result, wilson_interval
from run_folder import load_checkpoint
from torch import Tensor, nn

import ait
from ait.data import load_images
from ait.models import PretrainedConfig
from ait.nn.memory import Memory

try:
    import safetensors.torch
    import tyro
except ImportError as missing:
    raise ImportError(f'experiments: {missing}; pip install "associative-transformer[train,pretrained]"') from missing


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    checkpoint: tyro.conf.Positional[Path]
    """checkpoint.pt of a finished run; its result.json must lie beside it."""
    out: tyro.conf.Positional[Path]
    """The file to write."""
    data_dir: Path | None = None
    """Folder with the data that the model was trained on; the digits need none."""
    overwrite: bool = False
    """Replace the file if it is there."""
    threads: int | None = None
    """CPU threads; torch's choice by default."""


def export(options: Options) -> PretrainedConfig:
    """Rounds, tests and writes the weights of a run.

    Returns:
        What the file says of itself.

    Raises:
        FileNotFoundError: the checkpoint, its ``result.json`` or the data are missing.
        FileExistsError: there is a file already, and ``overwrite`` is False.
        ValueError: checkpoint and result are not of one finished run, or a weight does not fit float16.
    """
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(f"export_weights: expected a new file, got {options.out}; see --overwrite")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = load_checkpoint(options.checkpoint)
    model = model_of(checkpoint, options.checkpoint)
    result = read_result(options.checkpoint.parent / "result.json")
    described = {"model": checkpoint["model"], "data": checkpoint["config"]["data"], "kept_epoch": checkpoint["epoch"]}
    stated = {name: result.get(name) for name in described}
    if described != stated or not result.get("git_revision"):
        raise ValueError(
            f"export_weights: expected a result.json with a git_revision, of the checkpoint's run, {described}, got "
            f"{stated} with git_revision {result.get('git_revision')!r}"
        )
    tensors = rounded(model)
    model.load_state_dict(tensors)
    splits = load_images(result["data"], options.data_dir, img_size=checkpoint["config"].get("img_size"))
    correct = int(answers_right(model, splits.test, splits.normalize).sum())
    config = PretrainedConfig(
        model=result["model"],
        model_arguments=checkpoint["model_arguments"],
        data=result["data"],
        mean=splits.mean,
        std=splits.std,
        classes=splits.test.classes,
        parameters=ait.count_parameters(model).parameters,
        test_correct=correct,
        test_images=len(splits.test),
        test_interval_95=wilson_interval(correct, len(splits.test)),
        float32_test_correct=result["test_correct"],
        epochs=result["kept_epoch"],
        git_revision=result["git_revision"],
    )
    temporary = options.out.with_name(options.out.name + ".tmp")
    temporary.write_bytes(serialize(tensors, config.to_metadata()))
    os.replace(temporary, options.out)
    return config


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in float16; memories, which are kept in float32, and integers as they are.

    Raises:
        ValueError: a finite number is too large for float16, or a number is not finite.
    """
    memories = {f"{name}.gamma" for name, module in model.named_modules() if isinstance(module, Memory)}
    tensors = {}
    for name, tensor in model.state_dict().items():
        half = tensor.is_floating_point() and name not in memories
        tensors[name] = tensor.to(torch.float16 if half else tensor.dtype).contiguous()
        if not tensors[name].isfinite().all():
            raise ValueError(f"export_weights: expected {name} to be finite in {tensors[name].dtype}, got inf or NaN")
    return tensors


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes each time: safetensors itself leaves the metadata in random order."""
    content = safetensors.torch.save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        config = export(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    content = options.out.read_bytes()
    print(
        f"{options.out}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}\n"
        f"{config.name}: test accuracy {100 * config.test_accuracy:.2f} % in float16, "
        f"{100 * config.float32_test_correct / config.test_images:.2f} % before rounding"
    )


if __name__ == "__main__":
    main()
