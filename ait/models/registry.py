"""Models by name."""

from __future__ import annotations

import fnmatch
import inspect
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from ait.models.ait import AssociativeTransformer
from ait.models.pretrained import list_pretrained, load_pretrained, pretrained_config
from ait.models.sharing import HUB_PREFIX, Saved, arguments_of, build, read_saved
from ait.models.vit import VisionTransformer
from ait.nn._validate import suggest


class _Entry(NamedTuple):
    """A model class, and the arguments that make one of its sizes."""

    model: type[nn.Module]
    defaults: Mapping[str, Any]


_TINY = {"embed_dim": 128, "depth": 3, "head_dim": 32}
# 32 slots as published, half as wide, and the most heads with which AiT has at most 10 % more parameters than the
# ViT: 7 % on CIFAR-10, 8 % on the digits. Heads times slot width, 48 of 128, is near the published 256 of 768.
_TINY_WORKSPACE = {"num_slots": 32, "slot_dim": 16, "workspace_heads": 3}

_MODELS: Mapping[str, _Entry] = MappingProxyType(
    {
        "ait_tiny": _Entry(AssociativeTransformer, _TINY | _TINY_WORKSPACE),
        "ait_small": _Entry(AssociativeTransformer, {"embed_dim": 768, "depth": 2}),
        "ait_medium": _Entry(AssociativeTransformer, {"embed_dim": 768, "depth": 6}),
        "ait_base": _Entry(AssociativeTransformer, {"embed_dim": 768, "depth": 12}),
        "vit_tiny": _Entry(VisionTransformer, _TINY),
        "vit_small": _Entry(VisionTransformer, {"embed_dim": 768, "depth": 2}),
        "vit_medium": _Entry(VisionTransformer, {"embed_dim": 768, "depth": 6}),
        "vit_base": _Entry(VisionTransformer, {"embed_dim": 768, "depth": 12}),
    }
)

_IMAGE = {"img_size": 32, "patch_size": 4, "in_chans": 3, "num_classes": 10}


def create_model(
    name: str,
    *,
    pretrained: str | os.PathLike[str] | None = None,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> nn.Module:
    """Makes a model by name, with fresh parameters or with weights that are shipped in the package.

    ``small``, ``medium`` and ``base`` are the published sizes: 768 wide, MLP 3072, heads 64 wide, and 2, 6 or 12
    blocks. ``tiny`` is for a laptop's CPU: 128 wide, MLP 512, 4 heads 32 wide, 3 blocks; the workspace of
    ``ait_tiny`` (32 slots 16 wide, 3 heads) is sized so that it has at most 10 % more parameters than
    ``vit_tiny``, on CIFAR-10 with patch 4 as on the 8 x 8 digits with patch 2.

    Args:
        name: one of :func:`list_models`.
        pretrained: weights to start from, such as ``"cifar10"``; see :func:`list_pretrained`. With another
            ``num_classes`` than theirs the last layer is fresh; every other tensor must have their shape.
            :func:`ait.pretrained_config` says how images were normalised. Or where a model of this name was saved:
            a folder, a ``.safetensors`` file, or ``"hf-hub:user/repository"`` (``@revision`` may follow), as in
            :meth:`~ait.models.sharing.Shareable.from_pretrained`; its arguments are then the defaults of all others.
        img_size: height and width in pixels, or one number for both; each a multiple of ``patch_size``. 32 by default,
            or what the weights were trained with; so are the three that follow.
        patch_size: side of a patch in pixels; 4 by default.
        in_chans: channels of an image; 3 by default.
        num_classes: number of logits; 10 by default.
        **options: further keyword arguments of the model's class, over those that make the size.

    Returns:
        The model, on the default device, in training mode.

    Raises:
        ValueError: no model or weights have this name, an argument's value is refused, or the weights do not fit.
        TypeError: the model has no such option.
        FileNotFoundError: there is no such folder or file of weights.
        ImportError: safetensors (huggingface_hub, for ``hf-hub:``) is needed for ``pretrained``, and not installed.

    Example:
        >>> model = create_model("ait_tiny", img_size=8, patch_size=2, in_chans=1, reader="attention")
        >>> model(torch.zeros(64, 1, 8, 8)).shape
        torch.Size([64, 10])
    """
    if not isinstance(name, str) or name not in _MODELS:
        raise ValueError(f"create_model: no model named {name!r}; {suggest(str(name), list_models())}")
    entry = _MODELS[name]
    known = _options(entry.model)
    for option in options:
        if option not in known:
            raise TypeError(f"create_model: {name} has no option {option!r}; {suggest(option, sorted(known))}")
    given = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "num_classes": num_classes}
    image = _IMAGE | {argument: value for argument, value in given.items() if value is not None}
    if pretrained is None:
        return entry.model(**{**entry.defaults, **image, **options})
    asked = {argument: value for argument, value in given.items() if value is not None}
    weights = f"{name}.{pretrained}"
    if weights not in list_pretrained() and _is_place(pretrained):
        return _from_saved(name, read_saved(pretrained), asked | options)
    if weights not in list_pretrained():
        raise ValueError(
            f"create_model: {name} has no pretrained weights {pretrained!r}; there are {', '.join(list_pretrained())}, "
            "and of other places 'hf-hub:user/repository', folders, and .safetensors files"
        )
    trained = pretrained_config(weights).model_arguments
    model = entry.model(**{**entry.defaults, **_IMAGE, **trained, **asked, **options})
    load_pretrained(model, weights)
    return model


def list_models(filter: str | None = None) -> list[str]:
    """Names that :func:`create_model` knows, sorted.

    Args:
        filter: shell pattern such as ``"ait_*"``; None lists all.
    """
    return sorted(fnmatch.filter(_MODELS, "*" if filter is None else filter))


def _is_place(pretrained: str | os.PathLike[str]) -> bool:
    """Whether it names a folder, a file or a repository, rather than shipped weights."""
    if not isinstance(pretrained, str):
        return isinstance(pretrained, os.PathLike)
    return pretrained.startswith(HUB_PREFIX) or bool(set("/\\.") & set(pretrained)) or os.path.exists(pretrained)


def _from_saved(name: str, saved: Saved, options: Mapping[str, Any]) -> nn.Module:
    """A saved model, in training mode, if it is one of this name."""
    entry, arguments = _MODELS[name], arguments_of(saved)
    kind, expected = saved.config["architecture"], entry.model.__name__
    if kind != expected:
        raise ValueError(f"create_model: {name} is of {expected}, and {saved.source} holds one of {kind}")
    others = {key: arguments.get(key) for key, value in entry.defaults.items() if arguments.get(key) != value}
    if others := {key: value for key, value in others.items() if key not in options}:
        found = ", ".join(f"{key}={value!r} for {entry.defaults[key]!r}" for key, value in others.items())
        cure = f"{expected}.from_pretrained loads it as it is"
        raise ValueError(f"create_model: {saved.source} does not hold {name}: it has {found}; {cure}")
    return build(entry.model, saved, options)


def _options(model: type[nn.Module]) -> set[str]:
    """Keyword-only arguments of a class and of those that it passes ``**`` on to, its bases."""
    return {
        parameter.name
        for cls in model.__mro__
        for parameter in inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
