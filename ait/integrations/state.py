"""What was added to a host, as a small file of its own: names and tensors, and the arguments that made the places.

A file is safetensors or PyTorch's own format. Neither is unpickled: ``torch.load`` runs with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ait.integrations.insertion import carry_out
from ait.integrations.planning import from_json, plan_insertion
from ait.integrations.summary import Workspace, find_workspaces, insertion_of
from ait.models.checkpoint import why_unreadable
from ait.ops._checks import op_error

Model = TypeVar("Model", bound=nn.Module)

# The arguments of the insertion, as JSON in UTF-8, one byte an entry: a tensor like the others, so that it goes
# wherever they go.
ARGUMENTS_ENTRY = "ait_workspace_arguments"
LONGEST_ARGUMENTS = 1 << 20
ZIP, PICKLE = b"PK\x03\x04", b"\x80"


def workspace_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Only what a workspace adds to its host: a small part of ``model.state_dict()``, under the same names.

    One more entry, ``"ait_workspace_arguments"``, holds the arguments of :func:`ait.insert_workspace` as the bytes of
    a JSON text, so that :func:`ait.load_workspace` can put the workspaces into a fresh host. Save it like any state
    dict: ``safetensors.torch.save_file(state, path)`` or ``torch.save(state, path)``.

    Args:
        model: a model with workspaces, also inside wrappers.

    Returns:
        Detached tensors that share memory with the model's.

    Raises:
        ValueError: ``model`` has no workspace.
    """
    found = _find("workspace_state_dict", model)
    if not found:
        expected = "a model with a workspace in it (ait.insert_workspace)"
        raise op_error("workspace_state_dict", expected, type(model).__name__)
    state = {f"{name}.{key}" if name else key: value.detach() for name, m in found for key, value in _tensors(m)}
    layers = {name: _number(module, index) for index, (name, module) in enumerate(found)}
    insertion = insertion_of(found[0][1])
    return with_arguments(state, None if insertion is None else insertion.arguments, layers)


def load_workspace(model: Model, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Model:
    """Loads what :func:`ait.workspace_state_dict` gave, into a model with the same workspaces or into a bare host.

    A host without workspaces gets them first, as the file's own arguments say. Layers are matched by their number, so
    a file also fits where another version of a library gives the blocks other names, or a wrapper stands around them.
    Tensors take the dtype and device of the model's own.

    Args:
        model: a host, with workspaces or without.
        source: a file (safetensors, or written by ``torch.save``), or the state dict itself. A file is never
            unpickled, so one from a stranger can run no code.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the file is corrupted or no such file, is for other layers, options or widths (the message says
            which), or the model cannot take a workspace. The model is as it was.
        FileNotFoundError: there is no such file.
        ImportError: the file is safetensors, which is not installed.
    """
    name = "load_workspace"
    found = _find(name, model)
    state, where = (dict(source), "the state dict") if isinstance(source, Mapping) else (_read(name, source), source)
    record = _read_record(name, state, where)
    if found:
        _check_arguments(name, found, record, where)
        for module, tensors in _match(name, found, state, record, where):
            _fill(module, tensors)
        return model
    if record is None or record.arguments is None:
        cure = "insert as in its model, then load it, or a whole model's state dict with model.load_state_dict"
        expected = f"a model with workspaces, since {where} does not say how to insert them ({cure})"
        raise op_error(name, expected, f"a bare {type(model).__name__}")
    try:
        # Tensors without memory, until the file's own sizes are known to agree with its arguments.
        plan = plan_insertion(name, model, *_split_arguments(record.arguments), device="meta")
    except ValueError as error:
        raise ValueError(f"{error} (inserting as {where} says)") from error
    new = [(planned.name, planned.module) for planned in plan.workspaces]
    matched = _match(name, new, state, record, where)
    for planned, (module, tensors) in zip(plan.workspaces, matched, strict=True):
        module.to_empty(device=planned.device)
        _fill(module, tensors)
    carry_out(model, plan)
    return model


class _Record(NamedTuple):
    """What a file says of itself."""

    arguments: dict[str, Any] | None  # of the insertion
    layers: dict[str, int]  # number of each layer, by the name that it has in the file


def with_arguments(
    state: dict[str, Tensor], arguments: dict[str, Any] | None, layers: dict[str, int]
) -> dict[str, Tensor]:
    """``state`` with the entry that says how its workspaces were inserted, and which layer has which name."""
    text = json.dumps({"arguments": arguments, "layers": layers}).encode()
    return {**state, ARGUMENTS_ENTRY: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _find(caller: str, model: Any) -> list[tuple[str, Workspace]]:
    if not isinstance(model, nn.Module):
        raise op_error(caller, "a torch.nn.Module", type(model).__name__)
    return list(find_workspaces(model))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict(keep_vars=True).items())


def _number(module: nn.Module, index: int) -> int:
    insertion = insertion_of(module)
    return index if insertion is None else insertion.layer


def _read(caller: str, source: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict in a file, which is data and not code."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{caller}: expected a file of a workspace, got {path}, which does not exist")
    if not path.is_file():
        cure = "folders of save_pretrained are read by ait.with_workspace(ModelClass).from_pretrained"
        raise op_error(caller, f"a file of a workspace ({cure})", path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start.startswith((ZIP, PICKLE)):
            state = torch.load(path, map_location="cpu", weights_only=True)
        elif start[8:] == b"{":
            state = _load_safetensors(caller, path)
        else:
            raise ValueError("its first bytes are those of neither")
    except ImportError:
        raise
    except Exception as error:
        expected = (
            "a whole file of a workspace (safetensors, or torch.save of ait.workspace_state_dict(model)); it was not "
            "unpickled"
        )
        raise op_error(caller, expected, f"{path}: {why_unreadable(path, error)}") from error
    if not isinstance(state, Mapping):
        raise op_error(caller, "a state dict in the file", f"{path} with {type(state).__name__}")
    return dict(state)


def _load_safetensors(caller: str, path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{caller}: expected safetensors to be installed for {path}: pip install safetensors"
        ) from error
    return load_file(path)


def _read_record(caller: str, state: dict[str, Any], where: Any) -> _Record | None:
    """Takes the record out of ``state``, whose other entries are checked to be tensors by name."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise op_error(caller, f"names and tensors in {where}", f"{key!r}: {type(value).__name__}")
    entry = state.pop(ARGUMENTS_ENTRY, None)
    if entry is None:
        return None
    expected = f"the arguments of ait.insert_workspace as JSON in {ARGUMENTS_ENTRY!r} of {where}"
    if entry.dtype != torch.uint8 or entry.dim() != 1 or not 0 < entry.numel() <= LONGEST_ARGUMENTS:
        raise op_error(caller, expected, f"{entry.dtype} of shape {tuple(entry.shape)}")
    try:
        content = json.loads(bytes(entry.tolist()).decode())
        arguments, layers = content["arguments"], content["layers"]
        well_formed = (arguments is None or isinstance(arguments, dict)) and isinstance(layers, dict)
        if not well_formed or not all(isinstance(number, int) for number in layers.values()):
            raise ValueError("entries of other types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise op_error(caller, expected, error) from error
    return _Record(arguments, layers)


def _split_arguments(arguments: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """``layers``, ``mode``, ``prefix_tokens`` and the options."""
    options = dict(arguments)
    layers, mode = options.pop("layers", None), options.pop("mode", None)
    return layers, mode, options.pop("prefix_tokens", "in"), from_json(options)


def _check_arguments(caller: str, found: list[tuple[str, Workspace]], record: _Record | None, where: Any) -> None:
    """Checks that the model's workspaces were put in as those of the file were."""
    insertion = insertion_of(found[0][1])
    if record is None or record.arguments is None or insertion is None:
        return
    ours, theirs = insertion.arguments, record.arguments
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differing:
        expected = ", ".join(f"{key}={ours[key]!r}" if key in ours else f"the default {key}" for key in differing)
        got = ", ".join(f"{key}={theirs[key]!r}" if key in theirs else f"the default {key}" for key in differing)
        cure = "a host without workspaces gets those of the file"
        raise op_error(caller, f"a workspace with {expected} as in the model ({cure})", f"{got} in {where}")


def _match(
    caller: str,
    found: Sequence[tuple[str, nn.Module]],
    state: dict[str, Tensor],
    record: _Record | None,
    where: Any,
) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The tensors of each module, all of them checked: there, of the right shape and kind, finite."""
    numbers = [_number(module, index) for index, (_, module) in enumerate(found)]
    names_in_file = {number: name for number, (name, _) in zip(numbers, found, strict=True)}
    if record is not None:
        names_in_file = {number: name for name, number in record.layers.items()}
        if sorted(names_in_file) != sorted(numbers) or len(names_in_file) != len(record.layers):
            raise op_error(caller, f"layers {sorted(numbers)}", f"{sorted(record.layers.values())} in {where}")
    remaining = dict(state)
    matched = []
    for number, (_, module) in zip(numbers, found, strict=True):
        tensors = {}
        for key, own in _tensors(module):
            name = f"{names_in_file[number]}.{key}" if names_in_file[number] else key
            if name not in remaining:
                raise op_error(caller, f"{name!r} in {where}", f"{len(state)} entries without it")
            tensor = remaining.pop(name)
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                raise op_error(caller, f"{name!r} to be an ordinary tensor", f"{tensor.layout} on {tensor.device}")
            if tensor.shape != own.shape or tensor.is_floating_point() != own.is_floating_point():
                expected = f"{name!r} of shape {tuple(own.shape)} and dtype {own.dtype}"
                raise op_error(caller, expected, f"{tuple(tensor.shape)} and {tensor.dtype} in {where}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise op_error(caller, f"finite numbers in {name!r}", f"infinity or NaN in {where}")
            tensors[key] = tensor
        matched.append((module, tensors))
    if remaining:
        names = ", ".join(map(repr, list(remaining)[:3]))
        expected = f"entries of workspaces alone in {where} (a whole model's go into model.load_state_dict)"
        raise op_error(caller, expected, f"{len(remaining)} others, such as {names}")
    return matched


@torch.no_grad()
def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for key, own in _tensors(module):
        own.copy_(tensors[key])
