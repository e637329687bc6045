"""Which workspaces a model has, what they are called, and how its images become tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ait.integrations.inserted import InsertedLayer, InsertedWorkspace
from ait.nn.workspace import GlobalWorkspace
from ait.ops._checks import op_error

MOST_PREFIX_TOKENS = 16
# Names that wrappers (DistributedDataParallel, torch.compile, FSDP, checkpoint_wrapper) put into those of modules.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def find_workspaces(caller: str, model: Any) -> dict[str, GlobalWorkspace]:
    """The workspaces of an unwrapped model by name.

    Raises:
        ValueError: ``model`` is no module, or has no workspace.
    """
    if not isinstance(model, nn.Module):
        raise op_error(caller, "a torch.nn.Module", type(model).__name__)
    found = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS) or "workspace": module
        for name, module in model.named_modules()
        if isinstance(module, GlobalWorkspace)
    }
    if not found:
        raise op_error(
            caller,
            "a model with a GlobalWorkspace or GlobalWorkspaceLayer in it",
            f"{type(model).__name__} without one (ait.insert_workspace puts them into a model, and ait.create_model "
            "makes models that have them)",
        )
    return found


def choose_workspaces(
    caller: str, workspaces: dict[str, GlobalWorkspace], layers: Sequence[str | int] | str | int | None
) -> dict[str, GlobalWorkspace]:
    """Those of ``workspaces`` that ``layers`` names: by index, by name, or by the name of a module around them.

    Raises:
        ValueError: a layer does not exist, or none is named.
    """
    if layers is None:
        return workspaces
    names = list(workspaces)
    chosen: set[str] = set()
    for layer in list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]:
        if isinstance(layer, int) and not isinstance(layer, bool) and -len(names) <= layer < len(names):
            chosen.add(names[layer])
            continue
        inside = [name for name in names if isinstance(layer, str) and f"{name}.".startswith(f"{layer}.")]
        if not inside:
            known = ", ".join(map(repr, names))
            raise op_error(caller, f"layers by index (0 to {len(names) - 1}) or name ({known})", repr(layer))
        chosen.update(inside)
    if not chosen:
        raise op_error(caller, "at least one layer, or layers=None for all", repr(layers))
    return {name: workspace for name, workspace in workspaces.items() if name in chosen}


def find_name(caller: str, names: Sequence[str], layer: str | int) -> str:
    """The one of ``names`` that ``layer`` is: by index, by name, or by the name of a module around it alone.

    Raises:
        ValueError: it is none of them, or could be several.
    """
    if isinstance(layer, int) and not isinstance(layer, bool) and -len(names) <= layer < len(names):
        return names[layer]
    inside = [name for name in names if isinstance(layer, str) and f"{name}.".startswith(f"{layer}.")]
    if isinstance(layer, str) and (layer in names or len(inside) == 1):
        return layer if layer in names else inside[0]
    known = ", ".join(map(repr, inside or names))
    expected = (
        f"a recorded layer (an index, or one of {known})" if names else "a recorded layer, of which there is none"
    )
    raise op_error(caller, expected, repr(layer))


def find_ambient_mask(model: nn.Module, workspace: GlobalWorkspace) -> Callable[[Tensor], Tensor | None] | None:
    """What a host that a workspace was inserted into says about padding and class tokens; None where none says it."""
    if not workspace.mask_is_ambient:
        return None
    for module in model.modules():
        if isinstance(module, InsertedWorkspace | InsertedLayer) and module.workspace is workspace:
            return module.mask.of
    return None


def patch_grid(model: nn.Module, num_tokens: int) -> tuple[tuple[int, int] | None, int | None]:
    """Grid of patches and number of tokens before them in a sequence of ``num_tokens``, as far as the model tells.

    Models of ait and timm tell ``patch_embed.grid_size``, those of torchvision and Transformers ``image_size`` and
    ``patch_size``. The grid is of use only where it and the few tokens before it (class token, registers, a question)
    add up to the sequence, which they do not in later stages of a pyramid or for images of another size.
    """
    for module in model.modules():
        grid = _grid_of(module)
        if grid is None:
            continue
        prefix = num_tokens - grid[0] * grid[1]
        expected = getattr(module, "num_prefix_tokens", None)
        if prefix == expected or (expected is None and 0 <= prefix <= MOST_PREFIX_TOKENS):
            return grid, prefix
    return None, None


def _grid_of(module: nn.Module) -> tuple[int, int] | None:
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    if grid is None:
        image, patch = getattr(module, "image_size", None), getattr(module, "patch_size", None)
        if image is None or patch is None:
            return None
        grid = [side // step for side, step in zip(_pair(image), _pair(patch), strict=True)]
    rows, columns = _pair(grid)
    return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, Sequence) else (value, value)
    return int(height), int(width)
