"""Which workspaces an insertion would make, and whether it can be carried out: nothing here changes the host."""

from __future__ import annotations

import inspect
import numbers
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ait.integrations.hosts import Block, Place, find_blocks
from ait.integrations.inserted import CHILD_NAME, InsertedLayer, InsertedWorkspace, Insertion
from ait.integrations.masks import PaddingMask, TokenMask
from ait.integrations.refused import refusal
from ait.nn._validate import check_choice, suggest
from ait.nn.workspace import GlobalWorkspace, GlobalWorkspaceLayer
from ait.ops._checks import TOKEN_DTYPES, op_error

MODES = ("wrap", "parallel", "replace")
FROM_HOST = ("dim", "self", "device", "dtype")


class Planned(NamedTuple):
    """One workspace and its block. The module is on the device of the plan, ``device`` is that of the block's MLP."""

    block: Block
    place: Place
    module: InsertedWorkspace | InsertedLayer
    device: torch.device

    @property
    def name(self) -> str:
        """Of the module, once it is in its host."""
        child = self.place.input_path if isinstance(self.module, InsertedLayer) else CHILD_NAME
        return f"{self.block.name}.{child}"


class Plan(NamedTuple):
    """All that an insertion puts into a host."""

    workspaces: list[Planned]
    paddings: list[tuple[nn.Module, PaddingMask]]  # with the modules that are told about padding
    arguments: dict[str, Any]  # of the insertion, as JSON has them


def plan_insertion(
    caller: str,
    model: nn.Module,
    layers: Any,
    mode: str,
    prefix_tokens: Any,
    options: dict[str, Any],
    device: torch.device | str | None = None,
) -> Plan:
    """Finds the places, checks them, and makes the modules that go there.

    Args:
        caller: the function that errors speak of.
        model, layers, mode, prefix_tokens, options: see :func:`ait.insert_workspace`.
        device: device of the modules; that of each MLP by default.

    Raises:
        ValueError: see :func:`ait.insert_workspace`.
    """
    refused = refusal(model)
    if refused is not None:
        raise op_error(caller, *refused)
    check_choice(caller, "mode", mode, MODES)
    _check_options(caller, mode, options)
    present = [path for path, module in model.named_modules() if isinstance(module, (InsertedWorkspace, InsertedLayer))]
    if present:
        got = f"{type(model).__name__} with {len(present)}, the first at {present[0]!r}"
        raise op_error(caller, "a host without inserted workspaces (ait.remove_workspace takes them out)", got)
    blocks = find_blocks(model)
    if not blocks:
        raise op_error(
            caller,
            "a ViT or a text encoder: a list of blocks, each with an MLP named mlp, ffn, feed_forward, or intermediate "
            "and output",
            f"{type(model).__name__} without such a block",
        )
    numbers_chosen = _choose(caller, layers, len(blocks))
    chosen = [(number, blocks[number]) for number in numbers_chosen]
    _check_blocks(caller, chosen, blocks, mode)
    excluded = [_excluded_tokens(caller, block, prefix_tokens) for _, block in chosen]

    arguments = {
        "layers": numbers_chosen,
        "mode": mode,
        "prefix_tokens": prefix_tokens,
        **{option: _as_json(value) for option, value in options.items() if option != "generator"},
    }
    paddings: dict[int, tuple[nn.Module, PaddingMask]] = {}
    planned = []
    for (number, block), (prefix, writes) in zip(chosen, excluded, strict=True):
        told = block.padding_argument()
        padding = None
        if told is not None:
            owner, argument, position = told
            padding = paddings.setdefault(id(owner), (owner, PaddingMask(argument, position)))[1]
        mask = TokenMask(padding, prefix, prefix_writes=writes)
        assert block.place is not None
        module = _build(block, number, mode, mask, arguments, options, device)
        planned.append(Planned(block, block.place, module, _placement(block.place)["device"]))
    return Plan(planned, list(paddings.values()), arguments)


def option_names(mode: str) -> list[str]:
    """Names of the options that a mode takes."""
    layer = GlobalWorkspaceLayer if mode == "replace" else GlobalWorkspace
    return [name for name in inspect.signature(layer.__init__).parameters if name not in FROM_HOST]


def _check_options(caller: str, mode: str, options: dict[str, Any]) -> None:
    known = option_names(mode)
    for name in options:
        if name in ("device", "dtype"):
            raise op_error(caller, f"no {name}: it is that of the host", repr(options[name]))
        if name not in known:
            raise op_error(caller, f"options of mode {mode!r}", f"{name!r}; {suggest(name, known)}")


def _choose(caller: str, layers: Any, count: int) -> list[int]:
    """Numbers of the chosen blocks, ascending."""
    expected = f"layers 'all', a slice, or different integers from {-count} to {count - 1}"
    if isinstance(layers, str):
        if layers != "all":
            raise op_error(caller, expected, repr(layers))
        return list(range(count))
    if isinstance(layers, slice):
        chosen = sorted(range(count)[layers])
    elif isinstance(layers, Iterable):
        chosen = []
        for number in layers:
            if isinstance(number, bool) or not isinstance(number, numbers.Integral):
                raise op_error(caller, expected, repr(number))
            index = int(number)
            if not -count <= index < count:
                raise op_error(caller, f"{expected} ({count} blocks were found)", index)
            chosen.append(index % count)
        chosen.sort()
    else:
        raise op_error(caller, expected, repr(layers))
    if not chosen or len(set(chosen)) < len(chosen):
        raise op_error(caller, expected, repr(layers) if chosen else f"{layers!r}, which are none of {count} blocks")
    return chosen


def _check_blocks(caller: str, chosen: list[tuple[int, Block]], blocks: list[Block], mode: str) -> None:
    """Checks that every chosen block can take a workspace, and that it may."""
    usable = [number for number, block in enumerate(blocks) if block.place is not None]
    for number, block in chosen:
        where = f"{block.class_name} ({block.name!r}, layer {number})"
        causal = block.why_causal()
        if causal is not None:
            raise op_error(
                caller,
                "an encoder: through a memory that all tokens write, a causal decoder's tokens would see their future "
                "(of a model with both, pass the encoder)",
                f"{where}: {causal}",
            )
        if block.place is None:
            cure = f"; layers that have: {usable}" if usable else ""
            raise op_error(caller, f"blocks with an MLP of their own{cure}", f"{where}: {block.reason}")
        place = block.place
        if mode != "wrap" and place.dim_in != place.dim_out:
            raise op_error(
                caller, f"MLPs as wide at the end as at the start in mode {mode!r}", f"{where}: {_widths(place)}"
            )
        if mode == "replace" and not _is_replaceable(place):
            raise op_error(caller, "blocks whose MLP is one module in mode 'replace'; use 'wrap'", where)
        if hasattr(block.module, CHILD_NAME) or any(isinstance(m, GlobalWorkspace) for m in block.module.modules()):
            raise op_error(caller, "blocks without a workspace", where)
        if place.is_offloaded:
            raise op_error(caller, "MLPs that are in memory; load the host without offloading", where)
        dtype = _placement(place)["dtype"]
        if dtype not in TOKEN_DTYPES:
            raise op_error(caller, "MLPs of dtype float32, float64, bfloat16 or float16", f"{where}: {dtype}")
        if getattr(block.module, "chunk_size_feed_forward", 0):
            got = f"{where}: chunk_size_feed_forward={block.module.chunk_size_feed_forward}"
            raise op_error(caller, "blocks that give all their tokens to the MLP at once", got)
    shared = Counter(id(block.place.output_module) for _, block in chosen if block.place is not None)
    for number, block in chosen:
        if block.place is not None and shared[id(block.place.output_module)] > 1:
            got = f"{block.class_name} ({block.name!r}, layer {number}) with an MLP that is another block's, too"
            raise op_error(caller, "blocks with an MLP each", got)


def _excluded_tokens(caller: str, block: Block, prefix_tokens: Any) -> tuple[int, bool]:
    """How many class and register tokens ``block`` has, and whether they write."""
    known = block.prefix_tokens()
    if isinstance(prefix_tokens, str) and prefix_tokens in ("in", "out"):
        if prefix_tokens == "out" and known is None:
            got = f"'out', and {block.class_name} ({block.name!r}) in a model without any that it tells of"
            raise op_error(caller, "prefix_tokens 'in', or the number of class and register tokens", got)
        return known or 0, prefix_tokens == "in"
    if isinstance(prefix_tokens, int) and not isinstance(prefix_tokens, bool) and prefix_tokens >= 0:
        return prefix_tokens, False
    raise op_error(caller, "prefix_tokens 'in', 'out' or a number of tokens", repr(prefix_tokens))


def _build(
    block: Block,
    number: int,
    mode: str,
    mask: TokenMask,
    arguments: dict[str, Any],
    options: dict[str, Any],
    device: torch.device | str | None,
) -> InsertedWorkspace | InsertedLayer:
    place = block.place
    assert place is not None
    placement = _placement(place) | ({} if device is None else {"device": device})
    common: dict[str, Any] = dict(channels_first=place.channels_first, mask=mask, **placement, **options)
    module: InsertedWorkspace | InsertedLayer
    if mode == "replace":
        module = InsertedLayer(place.dim_out, **common)
    else:
        module = InsertedWorkspace(place.dim_out, mode=mode, **common)  # type: ignore[arg-type]
    module.insertion = Insertion(
        layer=number,
        block_class=block.class_name,
        host_parameters=sum(p.numel() for part in _mlp(place) for p in part.parameters()),
        host_flops=sum(_linear_flops(linear) for linear in place.linears),
        arguments=arguments,
    )
    return module.train(block.module.training)


def second_half(place: Place) -> nn.Module:
    return place.block.get_submodule(place.output_path.split(".")[0])


def _is_replaceable(place: Place) -> bool:
    """Whether nothing of the MLP lies between its modules."""
    if not place.is_split:
        return True
    return place.input_path == "intermediate" and isinstance(getattr(second_half(place), "dense", None), nn.Module)


def _mlp(place: Place) -> tuple[nn.Module, ...]:
    """What the MLP is made of; of a pair, the linear layers alone."""
    return place.linears if place.is_split else (place.input_module,)


def _widths(place: Place) -> str:
    return f"{place.dim_in} to {place.dim_out}"


def _placement(place: Place) -> dict[str, Any]:
    """Device and dtype of an MLP."""
    parameter = next(p for linear in place.linears for p in linear.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


def _linear_flops(linear: nn.Module) -> int:
    """Of a linear layer's product, a token: a multiplication and an addition for each weight."""
    weight = getattr(linear, "weight", None)
    return 2 * weight.numel() if isinstance(weight, torch.Tensor) else 0


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def from_json(options: dict[str, Any]) -> dict[str, Any]:
    """Options as :func:`ait.insert_workspace` takes them, from their JSON form."""
    dtype = options.get("selection_dtype")
    if not isinstance(dtype, str):
        return options
    return {**options, "selection_dtype": getattr(torch, dtype, dtype)}
