"""Weights that come with the package: what there is, what they were trained on, and how a model gets them.

``ait/models/weights/README.md`` is their card. Reading tensors needs safetensors, the extra ``[pretrained]``; the list
and the configs need nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ait.models.checkpoint import differences, shorten

WEIGHTS_DIR = Path(__file__).parent / "weights"

# SHA-256 of the files as experiments/export_weights.py wrote them.
_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "ait_tiny.cifar10": "366f6e286282d35e45b0af8c4b89d19a948a8ff330078d5fb2c73cd7fa5ffa36",
        "vit_tiny.cifar10": "fae6de557cb3e5ed86ff1c80d291af4bb8a909c48d983936cafd7a999bb900aa",
    }
)


@dataclass(frozen=True)
class PretrainedConfig:
    """What a file of weights says of itself.

    Images in [0, 1] are normalised to ``(image - mean) / std`` before the model sees them;
    ``ait.data.normalize(images, config.mean, config.std)`` does it for uint8.

    Args:
        model: name that :func:`ait.create_model` knows.
        model_arguments: arguments of ``create_model`` with which the model was trained.
        data: data set that it was trained on.
        mean: of each channel of images in [0, 1].
        std: the same for the standard deviation.
        classes: name of the class of each logit.
        parameters: number of parameters, memory entries not counted.
        test_correct: test images classified rightly by the weights as they are in the file (float16).
        test_images: images of the test set.
        test_interval_95: Wilson's 95 % interval of the test accuracy.
        float32_test_correct: test images classified rightly before the weights were rounded.
        epochs: epochs of training after which the weights were kept.
        git_revision: commit of this repository that trained them.
    """

    model: str
    model_arguments: Mapping[str, Any]
    data: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    parameters: int
    test_correct: int
    test_images: int
    test_interval_95: tuple[float, float]
    float32_test_correct: int
    epochs: int
    git_revision: str

    @property
    def name(self) -> str:
        """As :func:`list_pretrained` has it: ``"ait_tiny.cifar10"``."""
        return f"{self.model}.{self.data}"

    @property
    def test_accuracy(self) -> float:
        """Share of the test images that are classified rightly, in [0, 1]."""
        return self.test_correct / self.test_images

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file: strings as they are, anything else as JSON."""
        items = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": "pt"} | {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in items.items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PretrainedConfig:
        """Reads what :meth:`to_metadata` wrote.

        Raises:
            ValueError: an entry is missing or no JSON.
        """
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in metadata]
        if missing:
            raise ValueError(f"metadata without {', '.join(missing)}")
        plain = ("model", "data", "git_revision")
        values: dict[str, Any] = {
            field.name: metadata[field.name] if field.name in plain else _freeze(json.loads(metadata[field.name]))
            for field in dataclasses.fields(cls)
        }
        return cls(**values)


def list_pretrained() -> list[str]:
    """Names of the weights that come with the package, sorted: ``"ait_tiny.cifar10"`` and the like.

    What stands before the dot is the model, what stands after it is ``pretrained`` of :func:`ait.create_model`.
    """
    return sorted(_SHA256)


def pretrained_config(name: str) -> PretrainedConfig:
    """What weights were trained on, how images are normalised for them, their classes and their accuracy.

    Args:
        name: one of :func:`list_pretrained`.

    Raises:
        ValueError: no weights have this name, or their file is truncated or altered.
        FileNotFoundError: their file is missing.

    Example:
        >>> config = pretrained_config("ait_tiny.cifar10")
        >>> config.classes[:3], config.mean
        (('airplane', 'automobile', 'bird'), (0.4914, 0.4822, 0.4465))
    """
    path = _path(name)
    return _parse_config(_read(path, _SHA256[name]), path)


def load_pretrained(model: nn.Module, name: str) -> PretrainedConfig:
    """Overwrites the parameters and memories of a model with weights that come with the package.

    They take the dtype and device of the model's own. A model whose ``num_classes`` is another keeps its own last
    Linear. Names and shapes are compared: options that change neither (``beta``, ``top_k``, ``semantics``) are the
    caller's choice. Training or evaluation mode stays as it is.

    Args:
        model: as ``create_model`` makes it.
        name: one of :func:`list_pretrained`.

    Returns:
        What the weights say of themselves.

    Raises:
        ValueError: no weights have this name, their file is truncated or altered, or the model is another one or on
            the meta device; nothing is changed then.
        FileNotFoundError: the file is missing.
        ImportError: safetensors is not installed.
    """
    config, tensors = read_pretrained(name)
    assign_weights(model, config, tensors)
    return config


def read_pretrained(name: str) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """The config and the state dict of weights by name; errors as in :func:`load_pretrained`."""
    return read_weights(_path(name), _SHA256[name])


def read_weights(path: Path, sha256: str | None = None) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Reads a file that ``experiments/export_weights.py`` wrote.

    Args:
        path: the file.
        sha256: of the whole file, if it is known.

    Returns:
        What the file says of itself, and its state dict: float16, memories in float32.

    Raises:
        ValueError: it is truncated or altered, or another kind of file.
        FileNotFoundError: it is missing.
        ImportError: safetensors is not installed.
    """
    content = _read(path, sha256)
    config = _parse_config(content, path)
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        cure = "pip install 'associative-transformer[pretrained]'"
        message = f"pretrained weights: cannot import safetensors ({error}); {cure}"
        raise ImportError(message, name="safetensors") from error
    try:
        return config, safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"pretrained weights: {path}: expected a whole safetensors file, got: {error}") from error


def assign_weights(model: nn.Module, config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> None:
    """Copies a state dict into a model, all but the head where ``num_classes`` differs.

    Raises:
        ValueError: names or shapes differ, or the model is on the meta device; nothing is changed then.
    """
    ours, theirs = model.state_dict(), dict(tensors)
    if getattr(model, "num_classes", None) != config.model_arguments["num_classes"]:
        theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("head.")}
        theirs |= {name: tensor for name, tensor in ours.items() if name.startswith("head.")}
    if found := differences(ours, theirs):
        raise ValueError(f"pretrained weights: {config.name} do not fit this model, which has {shorten(found)}")
    if any(tensor.is_meta for tensor in ours.values()):
        raise ValueError(f"pretrained weights: {config.name}: expected a model with storage, got one on device 'meta'")
    model.load_state_dict(theirs)


def _path(name: str) -> Path:
    if not isinstance(name, str) or name not in _SHA256:
        known = ", ".join(map(repr, list_pretrained()))
        raise ValueError(f"pretrained weights: none are named {name!r}; there are {known}")
    return WEIGHTS_DIR / (name.replace(".", "-") + ".safetensors")


def _read(path: Path, sha256: str | None) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"pretrained weights: no file {path}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"pretrained weights: {path} is truncated or altered: expected SHA-256 {sha256}, got {found} "
            f"({len(content):,} bytes). Installing the package again restores it."
        )
    return content


def _parse_config(content: bytes, path: Path) -> PretrainedConfig:
    # A safetensors file: length of the header, 8 bytes little-endian; the header, JSON; the tensors.
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        if end > len(content):
            raise ValueError(f"a header up to byte {end:,} in a file of {len(content):,} bytes")
        header = json.loads(content[8:end])
        return PretrainedConfig.from_metadata(header.get("__metadata__") or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"pretrained weights: {path}: expected a safetensors file of experiments/export_weights.py, got: {error}"
        ) from error


def _freeze(value: Any) -> Any:
    """JSON's lists as tuples, also inside objects."""
    if isinstance(value, list):
        return tuple(map(_freeze, value))
    return {name: _freeze(each) for name, each in value.items()} if isinstance(value, dict) else value
