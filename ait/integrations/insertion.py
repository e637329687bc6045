"""Putting workspaces into a model that others built, and taking them out again."""

from __future__ import annotations

import inspect
import numbers
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ait.integrations.hosts import Block, Place, find_blocks
from ait.integrations.inserted import CHILD_NAME, InsertedLayer, InsertedWorkspace, Insertion
from ait.integrations.masks import PaddingMask, TokenMask
from ait.integrations.refused import refusal
from ait.nn._validate import check_choice
from ait.nn.workspace import GlobalWorkspace, GlobalWorkspaceLayer
from ait.ops._checks import TOKEN_DTYPES, op_error

Model = TypeVar("Model", bound=nn.Module)

MODES = ("wrap", "parallel", "replace")
CONFIG_ENTRY = "ait_workspace"  # of a transformers config
FROM_HOST = ("dim", "self", "device", "dtype")


def insert_workspace(
    model: Model,
    layers: Literal["all"] | Iterable[int] | slice = "all",
    *,
    mode: Literal["wrap", "parallel", "replace"] = "wrap",
    prefix_tokens: Literal["in", "out"] | int = "in",
    **options: Any,
) -> Model:
    """Puts a global workspace into blocks of a ViT or a text encoder, in place.

    Blocks are found by looking at the model, not by its name: a member of a list of modules with an ``mlp`` (or
    ``ffn``, ``feed_forward``, ``intermediate`` and ``output``) of its own, as in timm, torchvision and transformers.
    Widths are read from each MLP, so they may differ from stage to stage. With ``y = mlp(x)``, a block gets

    - ``"wrap"``: ``y + g * retrieve(LN(y))``;
    - ``"parallel"``: ``y + g * retrieve(LN(x))``;
    - ``"replace"``: the published :class:`ait.GlobalWorkspaceLayer` with its own ``fc1, fc2``; the block's MLP is gone.

    In the first two, ``g`` is one number a layer, 0 at first: the model's outputs stay the same, bit for bit. The
    host's modules and the names in its state dict stay as they are, too; each block gains one child,
    ``global_workspace``, that a forward hook calls. So the host's checkpoints, adapters and learning rates by layer
    still fit, and a host whose parameters are all frozen (``requires_grad=False``) is welcome.

    What padding the model is told about (``attention_mask`` of transformers, ``patch_valid`` of timm) never writes
    into the memory. In transformers models the arguments are noted in ``model.config``; see :func:`ait.with_workspace`
    for ``from_pretrained``.

    Insert before ``torch.compile``, DistributedDataParallel and the optimizer.

    Args:
        model: the host.
        layers: ``"all"``, or numbers of blocks in forward order (negative ones count from the end), or a slice.
        mode: see above.
        prefix_tokens: whether class and register tokens compete with the others for the memory. ``"out"``: they only
            read it. An integer says that so many first tokens of each image stay out, for hosts that do not tell.
        **options: of :class:`ait.GlobalWorkspace` (in ``"replace"`` of :class:`ait.GlobalWorkspaceLayer`):
            ``num_slots``, ``top_k_ratio``, ``generator``, and so on. Device and dtype are those of each MLP.
            ``write_dropout`` is 0 by default, except in ``"replace"``: an open or closed gate draws no random numbers
            of the host's own dropout.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an argument is not as above; no block was found; a chosen one has no place for a workspace (fused
            or parallel MLP, mixture of experts) or is causal (a shared memory would show tokens their future); the
            model has a workspace, is wrapped (DataParallel and its like), compiled, traced, scripted or quantised.
            The model is as it was.

    Example:
        >>> vit = timm.create_model("vit_base_patch16_224", pretrained=True)
        >>> ait.insert_workspace(vit, layers=slice(6, None))
        >>> print(ait.workspaces(vit).summary())
    """
    name = "insert_workspace"
    refused = refusal(model)
    if refused is not None:
        raise op_error(name, *refused)
    check_choice(name, "mode", mode, MODES)
    _check_options(name, mode, options)
    present = [path for path, module in model.named_modules() if isinstance(module, (InsertedWorkspace, InsertedLayer))]
    if present:
        got = f"{type(model).__name__} with {len(present)}, the first at {present[0]!r}"
        raise op_error(name, "a host without inserted workspaces (ait.remove_workspace takes them out)", got)
    blocks = find_blocks(model)
    if not blocks:
        raise op_error(
            name,
            "a ViT or a text encoder: a list of blocks, each with an MLP named mlp, ffn, feed_forward, or intermediate "
            "and output",
            f"{type(model).__name__} without such a block",
        )
    numbers_chosen = _choose(name, layers, len(blocks))
    chosen = [(number, blocks[number]) for number in numbers_chosen]
    _check_blocks(name, chosen, blocks, mode)
    excluded = [_excluded_tokens(name, block, prefix_tokens) for _, block in chosen]

    arguments = {
        "layers": numbers_chosen,
        "mode": mode,
        "prefix_tokens": prefix_tokens,
        **{option: _as_json(value) for option, value in options.items() if option != "generator"},
    }
    paddings: dict[int, tuple[nn.Module, PaddingMask]] = {}
    modules = []
    for (number, block), (prefix, writes) in zip(chosen, excluded, strict=True):
        told = block.padding_argument()
        padding = None
        if told is not None:
            owner, argument, position = told
            padding = paddings.setdefault(id(owner), (owner, PaddingMask(argument, position)))[1]
        mask = TokenMask(padding, prefix, prefix_writes=writes)
        modules.append(_build(block, number, mode, mask, arguments, options))

    # Nothing from here on fails.
    for (_, block), module in zip(chosen, modules, strict=True):
        _attach(block, module)
    for owner, padding in paddings.values():
        owner.register_forward_pre_hook(padding.begin, with_kwargs=True)
        owner.register_forward_hook(padding.end)
    if _has_config(model):
        setattr(model.config, CONFIG_ENTRY, arguments)
    return model


def remove_workspace(model: Model) -> Model:
    """Takes out what :func:`ait.insert_workspace` put in: the host computes what its own modules compute.

    Args:
        model: a host with workspaces in mode ``"wrap"`` or ``"parallel"``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is none, or one cannot be taken out (in mode ``"replace"`` the host's MLP is gone; a model
            that was built with workspaces has no other form). The model is as it was.
    """
    name = "remove_workspace"
    if not isinstance(model, nn.Module):
        raise op_error(name, "a torch.nn.Module", type(model).__name__)
    owners: list[tuple[nn.Module, InsertedWorkspace]] = []
    for path, module in model.named_modules():
        if not isinstance(module, (InsertedWorkspace, InsertedLayer)):
            continue
        if isinstance(module, InsertedLayer) or module.insertion is None:
            got = f"{path!r}, which took the place of a part of the host"
            raise op_error(name, "workspaces in mode 'wrap' or 'parallel', put in by ait.insert_workspace", got)
        owners.append((model.get_submodule(path.rpartition(".")[0]), module))
    if not owners:
        raise op_error(name, "a model with workspaces put in by ait.insert_workspace", type(model).__name__)
    removed: set[int] = set()
    for block, module in owners:
        removed |= {id(module), id(module.mask.padding)}
        delattr(block, CHILD_NAME)
    for module in model.modules():
        _drop_hooks(module, removed)
    if _has_config(model) and hasattr(model.config, CONFIG_ENTRY):
        delattr(model.config, CONFIG_ENTRY)
    return model


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
            raise op_error(caller, f"options of mode {mode!r}: {', '.join(known)}", name)


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
            if not -count <= number < count:
                raise op_error(caller, f"{expected} ({count} blocks were found)", int(number))
            chosen.append(int(number) % count)
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
        if block.place is None:
            cure = f"; layers that have: {usable}" if usable else ""
            raise op_error(caller, f"blocks with an MLP of their own{cure}", f"{where}: {block.reason}")
        causal = block.why_causal()
        if causal is not None:
            raise op_error(
                caller,
                "an encoder: through a memory that all tokens write, a causal decoder's tokens would see their future "
                "(of a model with both, pass the encoder)",
                f"{where}: {causal}",
            )
        place = block.place
        if mode != "wrap" and place.dim_in != place.dim_out:
            raise op_error(
                caller, f"MLPs as wide at the end as at the start in mode {mode!r}", f"{where}: {_widths(place)}"
            )
        if mode == "replace" and not _is_replaceable(place):
            raise op_error(caller, "blocks whose MLP is one module in mode 'replace'; use 'wrap'", where)
        if hasattr(block.module, CHILD_NAME) or any(isinstance(m, GlobalWorkspace) for m in block.module.modules()):
            raise op_error(caller, "blocks without a workspace", where)
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
    if isinstance(prefix_tokens, numbers.Integral) and not isinstance(prefix_tokens, bool) and prefix_tokens >= 0:
        return int(prefix_tokens), False
    raise op_error(caller, "prefix_tokens 'in', 'out' or a number of tokens", repr(prefix_tokens))


def _build(
    block: Block, number: int, mode: str, mask: TokenMask, arguments: dict[str, Any], options: dict[str, Any]
) -> InsertedWorkspace | InsertedLayer:
    place = block.place
    assert place is not None
    common: dict[str, Any] = dict(channels_first=place.channels_first, mask=mask, **_placement(place), **options)
    module: InsertedWorkspace | InsertedLayer
    if mode == "replace":
        module = InsertedLayer(place.dim_out, **common)
    else:
        module = InsertedWorkspace(place.dim_out, mode=mode, **common)  # type: ignore[arg-type]
    module.insertion = Insertion(
        layer=number,
        block_class=block.class_name,
        host_parameters=sum(p.numel() for linear in place.linears for p in linear.parameters()),
        host_flops=sum(_linear_flops(linear) for linear in place.linears),
        arguments=arguments,
    )
    return module.train(block.module.training)


def _attach(block: Block, module: InsertedWorkspace | InsertedLayer) -> None:
    place = block.place
    assert place is not None
    if isinstance(module, InsertedLayer):
        # In a pair, the second half may add the residual: it stays, without the linear layer in it.
        if place.is_split:
            _second_half(place).dense = nn.Identity()
        setattr(block.module, place.input_path, module)
        return
    block.module.add_module(CHILD_NAME, module)
    place.output_module.register_forward_hook(module.add_to_output, with_kwargs=True)
    if module.mode == "parallel" and place.is_split:
        place.input_module.register_forward_pre_hook(module.hold_input, with_kwargs=True)


def _second_half(place: Place) -> nn.Module:
    return place.block.get_submodule(place.output_path.split(".")[0])


def _is_replaceable(place: Place) -> bool:
    """Whether nothing of the MLP lies between its modules."""
    if not place.is_split:
        return True
    return place.input_path == "intermediate" and isinstance(getattr(_second_half(place), "dense", None), nn.Module)


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


def _drop_hooks(module: nn.Module, owners: set[int]) -> None:
    """Drops the hooks that are methods of one of ``owners``, given by id."""
    for hooks, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            if id(getattr(hook, "__self__", None)) in owners:
                del hooks[key]
                with_kwargs.pop(key, None)


def _has_config(model: nn.Module) -> bool:
    """Whether ``model`` keeps a config that is saved beside its weights, as those of transformers do."""
    return hasattr(getattr(model, "config", None), "to_json_string")


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value
