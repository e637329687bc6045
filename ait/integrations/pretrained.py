"""``from_pretrained`` of transformers for models that were saved with workspaces in them.

The library loads the host, and the workspaces are read from the same files: they then keep their names and dtypes in
every version. (Some take a memory's name for a LayerNorm's, all would round it to the dtype of the model.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ait.integrations.inserted import CHILD_NAME
from ait.integrations.insertion import CONFIG_ENTRY
from ait.integrations.state import load_workspace, with_arguments
from ait.ops._checks import op_error

NAME_IN_FILE = re.compile(rf"(?:^|\.){CHILD_NAME}\.")
LOCATION = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def with_workspace(model_class: Any) -> Loader:
    """Gives a transformers class a ``from_pretrained`` that rebuilds the workspaces, too.

    ``save_pretrained`` of a model with workspaces writes their weights beside the host's, and the arguments of
    :func:`ait.insert_workspace` into ``config.json``::

        model.save_pretrained(folder)
        model = ait.with_workspace(ViTForImageClassification).from_pretrained(folder)

    The class by itself loads the same files as a bare host (and reports the workspace's weights as unexpected).

    Args:
        model_class: any class with a ``from_pretrained``: a model class of transformers, or one of its auto classes.

    Raises:
        ValueError: it is no class, or has none.
    """
    if not (isinstance(model_class, type) and callable(getattr(model_class, "from_pretrained", None))):
        got = model_class.__name__ if isinstance(model_class, type) else f"an instance of {type(model_class).__name__}"
        raise op_error("with_workspace", "a class with from_pretrained, such as ViTModel", got)
    return Loader(model_class)


class Loader:
    """Loads models of a class with their workspaces; see :func:`ait.with_workspace`."""

    def __init__(self, model_class: Any) -> None:
        self.model_class = model_class

    def from_pretrained(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """``model_class.from_pretrained`` with workspaces as the model's config says; none if it says nothing.

        Args:
            path: folder or name on the hub.
            *args: of the class's own ``from_pretrained``.
            **kwargs: the same.

        Returns:
            What the class's own returns; a model in evaluation mode.

        Raises:
            ValueError: the files hold no workspaces, or others than the config says, or some that it is silent about.
        """
        loaded = self._load_host(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        given = kwargs.get("state_dict")
        state = _read_workspaces(path, kwargs) if given is None else _named(given)
        recorded = _recorded(model)
        if state and not recorded:
            # Where a part of a model keeps a copy of its config, an insertion into the part is not noted in the whole.
            cure = "a part's own is not saved: insert through the whole model, with layers=[...]"
            got = f"{len(state)} entries of workspaces that it is silent about: {path}"
            raise op_error("with_workspace", f"a config with {CONFIG_ENTRY!r} ({cure})", got)
        for name, owner, arguments in recorded:
            inside = {key: value for key, value in state.items() if _belongs(key, name)}
            if not inside:
                got = f"a config with {CONFIG_ENTRY!r} and weights without"
                raise op_error("with_workspace", "a checkpoint with workspaces in it", f"{got}: {path}")
            delattr(owner.config, CONFIG_ENTRY)
            load_workspace(owner, with_arguments(inside, arguments, _layer_names(inside, arguments)))
        return loaded

    def _load_host(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(self.model_class, nn.Module):
            return self.model_class.from_pretrained(path, *args, **kwargs)
        # A subclass for the time of loading, which is told not to wonder about our names.
        ignored = getattr(self.model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
        attributes = {
            "_keys_to_ignore_on_load_unexpected": [*ignored, NAME_IN_FILE.pattern],
            "__module__": self.model_class.__module__,
            "__qualname__": self.model_class.__qualname__,
        }
        quiet = type(self.model_class.__name__, (self.model_class,), attributes)
        loaded = quiet.from_pretrained(path, *args, **kwargs)  # type: ignore[attr-defined]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.__class__ = self.model_class
        return loaded

    def __repr__(self) -> str:
        return f"with_workspace({self.model_class.__name__})"


def _recorded(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """The modules whose config tells of an insertion, outermost ones, with its arguments."""
    found: list[tuple[str, nn.Module, dict[str, Any]]] = []
    for name, module in model.named_modules():
        arguments = getattr(getattr(module, "config", None), CONFIG_ENTRY, None)
        if isinstance(arguments, Mapping) and not any(_belongs(name, outer) for outer, _, _ in found):
            found.append((name, module, dict(arguments)))
    return found


def _belongs(name: str, owner: str) -> bool:
    return owner == "" or name == owner or name.startswith(f"{owner}.")


def _named(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if NAME_IN_FILE.search(name)}


def _read_workspaces(path: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of all workspaces in the files of a checkpoint, by their names there."""
    state: dict[str, Tensor] = {}
    for file in _checkpoint_files(path, kwargs):
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as tensors:
                state |= {name: tensors.get_tensor(name) for name in _named(dict.fromkeys(tensors.keys()))}
        else:
            state |= _named(torch.load(file, map_location="cpu", weights_only=True))
    return state


def _checkpoint_files(path: Any, kwargs: dict[str, Any]) -> Iterator[Path]:
    from transformers.utils.hub import cached_file

    where = {key: kwargs[key] for key in LOCATION if kwargs.get(key) is not None}
    silent = dict.fromkeys(
        (f"_raise_exceptions_for_{reason}" for reason in ("gated_repo", "missing_entries", "connection_errors")), False
    )
    variant = kwargs.get("variant")
    for name in FILES:
        if variant:
            stem, _, rest = name.partition(".")
            name = (
                f"{stem}.{rest.replace('index', f'index.{variant}')}" if "index" in rest else f"{stem}.{variant}.{rest}"
            )
        found = cached_file(path, name, **where, **silent)
        if found is None:
            continue
        if not name.endswith(".json"):
            yield Path(found)
            return
        weights = json.loads(Path(found).read_text())["weight_map"]
        for shard in sorted({shard for key, shard in weights.items() if NAME_IN_FILE.search(key)}):
            yield Path(str(cached_file(path, shard, **where)))
        return


def _layer_names(state: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, int]:
    """Number of each layer by its name in ``state``. Names of blocks differ between versions, their order does not."""
    inner = "" if arguments.get("mode") == "replace" else f".{CHILD_NAME}"
    prefixes = {name[: match.start()] + inner for name in state if (match := NAME_IN_FILE.search(name))}
    layers = arguments.get("layers")
    if not isinstance(layers, list) or len(layers) != len(prefixes):
        got = f"{len(prefixes)} in the files and {layers!r} in the config"
        raise op_error("with_workspace", "as many workspaces in the files as in the config", got)
    in_order = sorted(prefixes, key=lambda prefix: [int(part) if part.isdigit() else 0 for part in prefix.split(".")])
    return dict(zip(in_order, layers, strict=True))
