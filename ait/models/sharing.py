"""Models that are saved with the arguments that make them again, and loaded from folders, files and the Hub."""

from __future__ import annotations

import contextlib
import inspect
import numbers
import os
import re
import warnings
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ait._version import __version__
from ait.models.checkpoint import differences, read_folder, read_safetensors, shape_differences, shorten
from ait.nn.memory import Memory

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=nn.Module)

HUB_PREFIX = "hf-hub:"
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HEAD = "head."


class Saved(NamedTuple):
    """What a folder, a file or a repository holds."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str


class Shareable(nn.Module):
    """A model that remembers the arguments of its constructor.

    Saved are ``config.json`` (the class's name and its arguments, defaults included), ``model.safetensors`` (the state
    dict, memories included) and a model card. Nothing that is read is executed: the config names no code, and pickles
    are read with ``weights_only=True``.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        model = super().__new__(cls)
        object.__setattr__(model, "_arguments", (args, kwargs))
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Saves config, weights and, where there is none yet, a model card, through ``PyTorchModelHubMixin``.

        Args:
            save_directory: folder, made where it is missing; files of these names are overwritten, the card is not.
            repo_id: ``"user/name"`` for the card and for ``push_to_hub``, by default the folder's name.
            push_to_hub: whether to upload what was saved.
            model_card_kwargs: what the card is to say; see :func:`ait.integrations.hub.model_card`. The license is
                yours to state: without ``{"license": "mit"}`` or the like the card has none.
            **push_to_hub_kwargs: arguments of :meth:`push_to_hub`.

        Returns:
            The URL of the commit if it was uploaded.

        Raises:
            ValueError: the tensors are not those of a model of this class and these arguments (a layer was replaced,
                or a workspace inserted), an argument cannot be written as JSON, or the model is on the meta device;
                nothing is written then.
            ImportError: huggingface_hub or safetensors is not installed.
        """
        from ait.integrations.hub import HubModel

        saved = save(self)
        if push_to_hub and repo_id is None:
            repo_id = Path(save_directory).name
        return HubModel(saved, self, repo_id).save_pretrained(
            Path(save_directory),
            config=dict(saved.config),
            repo_id=repo_id,
            push_to_hub=push_to_hub,
            model_card_kwargs=dict(model_card_kwargs or {}),
            **push_to_hub_kwargs,
        )

    def push_to_hub(
        self, repo_id: str, *, model_card_kwargs: Mapping[str, Any] | None = None, **push_to_hub_kwargs: Any
    ) -> str:
        """Uploads what :meth:`save_pretrained` would save, as one commit.

        Args:
            repo_id: ``"user/name"``; the repository is made where it is missing.
            model_card_kwargs: as in :meth:`save_pretrained`.
            **push_to_hub_kwargs: ``commit_message``, ``private``, ``token``, ``branch``, ``create_pr``,
                ``allow_patterns``, ``ignore_patterns`` and ``delete_patterns`` of
                ``huggingface_hub.PyTorchModelHubMixin.push_to_hub``.

        Returns:
            The URL of the commit.

        Raises:
            ValueError, ImportError: as :meth:`save_pretrained`; errors of the Hub are huggingface_hub's.
        """
        from ait.integrations.hub import HubModel

        saved = save(self)
        return HubModel(saved, self, repo_id).push_to_hub(
            repo_id,
            config=dict(saved.config),
            model_card_kwargs=dict(model_card_kwargs or {}),
            **push_to_hub_kwargs,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        local_files_only: bool = False,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        **overrides: Any,
    ) -> Self:
        """Loads what :meth:`save_pretrained` saved, from a folder, a repository of the Hub, or one file.

        Args:
            pretrained_model_name_or_path: a folder; a repository, ``"user/name"`` or ``"user/name@revision"``; or a
                ``.safetensors`` file with a config in its header, as these folders hold and :mod:`ait.convert` writes.
            revision: branch, tag or commit of a repository. This and what follows, up to ``local_files_only``, are
                arguments of ``huggingface_hub.hf_hub_download`` and of no effect on folders and files.
            cache_dir: where downloads are kept.
            force_download: download again what is there.
            token: for private repositories.
            local_files_only: read the cache alone.
            map_location: device of the model.
            strict: False passes over tensors that are missing or too many, with a warning that names them; shapes
                must fit even then.
            **overrides: arguments of the constructor that take the place of those saved. With another ``num_classes``
                the last layer is fresh.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: there is no such folder or file, or it lacks a config or weights.
            ValueError: a file is corrupt or refused, the config is another model's, or weights do not fit it.
            ImportError: safetensors (or, for repositories, huggingface_hub) is not installed.
        """
        saved = read_saved(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
        return build(cls, saved, overrides, map_location=map_location, strict=strict).eval()


def read_saved(source: str | os.PathLike[str], **download: Any) -> Saved:
    """The config and the tensors of a folder, of a file, or, downloaded by huggingface_hub, of a repository."""
    text = os.fspath(source)
    if not isinstance(text, str):
        raise ValueError(f"from_pretrained: expected a folder, a file or a repository, got {source!r}")
    path = Path(text)
    if text and path.is_dir():
        return Saved(*read_folder(path), str(path))
    if path.is_file():
        if path.suffix != ".safetensors":
            cure = "python -m ait.convert reads checkpoints of the authors' code"
            raise ValueError(f"from_pretrained: {path}: expected a .safetensors file with a config; {cure}")
        config, tensors = read_safetensors(path)
        if config is None:
            raise ValueError(f"from_pretrained: {path}: expected a config in the header, got none")
        return Saved(config, tensors, str(path))
    repo_id, _, revision = text.removeprefix(HUB_PREFIX).partition("@")
    if path.suffix == ".safetensors" or not _REPO_ID.fullmatch(repo_id):
        raise FileNotFoundError(f"from_pretrained: no folder or file {text}, and no repository can have this name")
    from ait.integrations.hub import download_saved

    if revision:
        download["revision"] = revision
    return download_saved(repo_id, **download)


def save(model: nn.Module) -> Saved:
    """What there is to write of a model; errors as in :func:`config_of`, and for a model on the meta device."""
    config, tensors = config_of(model), model.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(f"{type(model).__name__}: expected a model with storage, got one on device 'meta'")
    return Saved(config, tensors, type(model).__name__)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The class of a model and the arguments that make it again, as JSON has them.

    ``dtype`` and ``num_classes`` are those that the model has now, ``device`` is left out.

    Raises:
        ValueError: the model does not know its arguments, one of them has no place in JSON, or a model of these
            arguments has tensors of other names or shapes.
    """
    cls = type(model)
    name = cls.__name__
    if not isinstance(model, Shareable):
        raise ValueError(f"{name}: expected AssociativeTransformer, VisionTransformer or a subclass of these")
    arguments = _bind(cls, *model._arguments) | _current(model)
    encoded = {argument: _encode(name, argument, value) for argument, value in arguments.items()}
    config = {"library_name": "ait", "library_version": __version__, "architecture": name, "arguments": encoded}
    with torch.device("meta"):
        twin = cls(**{argument: _decode(value) for argument, value in encoded.items()})
    if found := differences(twin.state_dict(), model.state_dict()):
        raise ValueError(
            f"{name}: expected the tensors that its arguments make, got {shorten(found)}. A model whose parts were "
            "replaced is saved with torch.save(model.state_dict()), an inserted workspace with "
            "ait.workspace_state_dict(model)"
        )
    return config


def arguments_of(saved: Saved) -> dict[str, Any]:
    """The constructor's arguments in a config; ValueError if it is none of this package."""
    arguments = saved.config.get("arguments")
    if not isinstance(saved.config.get("architecture"), str) or not isinstance(arguments, Mapping):
        found = ", ".join(sorted(map(str, saved.config))[:8]) or "an empty object"
        if "pretrained_cfg" in saved.config:
            found += (
                ", as timm saves it: import ait.integrations.timm_models and load it with "
                "timm.create_model('local-dir:...' or 'hf-hub:...', pretrained=True)"
            )
        raise ValueError(f"{saved.source}: expected a config with 'architecture' and 'arguments', got {found}")
    return {argument: _decode(value) for argument, value in arguments.items()}


def build(
    cls: type[M],
    saved: Saved,
    overrides: Mapping[str, Any],
    *,
    map_location: str | torch.device | None = None,
    strict: bool = True,
) -> M:
    """The model that was saved, of class ``cls`` or, where that has subclasses by this name, of one of them."""
    arguments = {**arguments_of(saved), **overrides}
    cls = _find_class(cls, saved)
    where = f"{saved.source}: {cls.__name__}"
    depth = arguments.get("depth")
    if isinstance(depth, int) and depth > len(saved.tensors) and strict:
        raise ValueError(f"{where}: expected tensors for each of {depth} blocks, got {len(saved.tensors)} in all")
    try:
        # Without storage first, so that sizes which do not fit the weights cost nothing.
        with torch.device("meta"):
            shapes = cls(**arguments).state_dict()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where} refuses the arguments of the config: {error}") from error
    tensors = dict(saved.tensors)
    fresh = "num_classes" in overrides and overrides["num_classes"] != arguments_of(saved).get("num_classes")
    if fresh:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
        shapes = {name: tensor for name, tensor in shapes.items() if not name.startswith(_HEAD)}
    if found := differences(shapes, tensors) if strict else shape_differences(shapes, tensors):
        raise ValueError(f"{where}: the weights do not fit the config: {shorten(found)}")
    with contextlib.nullcontext() if map_location is None else torch.device(map_location):
        model = cls(**arguments)
    result = model.load_state_dict(tensors, strict=False)
    passed_over = [f"the weights lack {name}" for name in result.missing_keys if name in shapes]
    passed_over += [f"the model lacks {name}" for name in result.unexpected_keys]
    if passed_over:
        warnings.warn(f"{where}: {shorten(passed_over)}", stacklevel=3)
    return model


def _find_class(cls: type[M], saved: Saved) -> type[M]:
    architecture = saved.config["architecture"]
    if any(base.__name__ == architecture for base in cls.__mro__ if issubclass(base, Shareable)):
        return cls
    waiting = list(cls.__subclasses__())
    while waiting:
        subclass = waiting.pop(0)
        if subclass.__name__ == architecture:
            return subclass
        waiting += subclass.__subclasses__()
    cure = ""
    if architecture in ("TimmAssociativeTransformer", "TimmVisionTransformer"):
        cure = "; import ait.integrations.timm_models, where that class is"
    expected = f"the config of a model of {cls.__name__}"
    raise ValueError(f"{saved.source}: expected {expected}, got one of {architecture}{cure}")


def _bind(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, with the defaults of those that were not given."""
    bound = inspect.signature(cls.__init__).bind(None, *args, **kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    for name, parameter in list(bound.signature.parameters.items())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= bound.arguments[name]
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[name] = bound.arguments[name]
    if cls.__module__.startswith("ait."):
        # Classes of this package pass ** on as it is; of others it is not known.
        defaults = [
            (name, parameter.default)
            for base in cls.__mro__
            for name, parameter in inspect.signature(base.__init__).parameters.items()  # type: ignore[misc]
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
        ]
        arguments = dict(reversed(defaults)) | arguments
    arguments.pop("device", None)
    return arguments


def _current(model: nn.Module) -> dict[str, Any]:
    """What may have changed since a model was made, where its constructor takes it."""
    parameters = inspect.signature(type(model).__init__).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    taken = {parameter.name for parameter in parameters}
    current: dict[str, Any] = {}
    # Memories have at least float32, whatever the dtype of the model.
    dtypes = [
        parameter.dtype
        for module in model.modules()
        if not isinstance(module, Memory)
        for parameter in module.parameters(recurse=False)
    ]
    if dtypes:
        current["dtype"] = reduce(torch.promote_types, dtypes)
    if isinstance(num_classes := getattr(model, "num_classes", None), int):
        current["num_classes"] = num_classes
    return {name: value for name, value in current.items() if takes_any or name in taken}


def _encode(cls: str, argument: str, value: Any) -> Any:
    """A value for JSON."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_encode(cls, argument, each) for each in value]
    raise ValueError(f"{cls}: expected {argument} to be a number, string, dtype or a list of these, got {value!r}")


def _decode(value: Any) -> Any:
    """What :func:`_encode` encoded; lists become tuples."""
    if isinstance(value, list):
        return tuple(map(_decode, value))
    if isinstance(value, str) and value.startswith("torch."):
        dtype = getattr(torch, value.removeprefix("torch."), None)
        return dtype if isinstance(dtype, torch.dtype) else value
    return value
