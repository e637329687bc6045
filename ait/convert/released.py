"""State dicts of the authors' released code, under this package's names.

Which names and shapes there are was read off the released code (github.com/yuweisunn/associative-transformer, commit
473c3d9: ``ait.py``, ``MHA.py``, ``vit_hn.py``, ``vit_hn_clevr.py``). Verified: the layer's names, its order of columns
and what it computes, by recorded steps of that code (``tests/data/released_layer.npz``); the number of entries of a
whole model, by the authors' counts. Inferred: the names of the shell and what it computes, which rest on reading the
code. No checkpoint that the authors' script saved was at hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ait.models.ait import AssociativeTransformer
from ait.models.checkpoint import is_state_dict, shape_differences, shorten
from ait.models.sharing import config_of
from ait.ops._checks import check_positive_int, op_error

_NAME = "convert_released"

# The release's names of tensors on the left, this package's on the right.
SHELL: Mapping[str, str] = MappingProxyType(
    {
        "to_patch_embedding.1.weight": "patch_embed.proj.norm_in.weight",
        "to_patch_embedding.1.bias": "patch_embed.proj.norm_in.bias",
        "to_patch_embedding.2.weight": "patch_embed.proj.linear.weight",
        "to_patch_embedding.2.bias": "patch_embed.proj.linear.bias",
        "to_patch_embedding.3.weight": "patch_embed.proj.norm_out.weight",
        "to_patch_embedding.3.bias": "patch_embed.proj.norm_out.bias",
        "question_to_embedding.0.weight": "question_embed.norm_in.weight",
        "question_to_embedding.0.bias": "question_embed.norm_in.bias",
        "question_to_embedding.1.weight": "question_embed.linear.weight",
        "question_to_embedding.1.bias": "question_embed.linear.bias",
        "question_to_embedding.2.weight": "question_embed.norm_out.weight",
        "question_to_embedding.2.bias": "question_embed.norm_out.bias",
        "mlp_head.0.weight": "head_norm.weight",
        "mlp_head.0.bias": "head_norm.bias",
        "mlp_head.1.weight": "head.weight",
        "mlp_head.1.bias": "head.bias",
    }
)
LAYER: Mapping[str, str] = MappingProxyType(
    {
        "fc1.weight": "fc1.weight",
        "fc1.bias": "fc1.bias",
        "fc2.weight": "fc2.weight",
        "fc2.bias": "fc2.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "memoryupdate.mha.w_qs.weight": "workspace.writer.query.weight",
        "memoryupdate.mha.w_ks.weight": "workspace.writer.key.weight",
        "memoryupdate.mha.w_vs.weight": "workspace.writer.value.weight",
        "memoryupdate.mha.fc.weight": "workspace.writer.out.weight",
        "memoryupdate.mha.layer_norm.weight": "workspace.writer.norm.weight",
        "memoryupdate.mha.layer_norm.bias": "workspace.writer.norm.bias",
        "memoryupdate.memory": "workspace.memory.gamma",
        "fc3.weight": "workspace.reader.proj.weight",
        "fc3.bias": "workspace.reader.proj.bias",
    }
)
_LAYER_PREFIX = "1.fn."
# Block i's names follow "transformer.layers.i." there and "blocks.i." here.
BLOCK: Mapping[str, str] = MappingProxyType(
    {
        "0.norm.weight": "norm1.weight",
        "0.norm.bias": "norm1.bias",
        "0.fn.to_qkv.weight": "attn.qkv.weight",
        "0.fn.to_out.0.weight": "attn.proj.weight",
        "0.fn.to_out.0.bias": "attn.proj.bias",
        "1.norm.weight": "norm2.weight",
        "1.norm.bias": "norm2.bias",
        **{_LAYER_PREFIX + theirs: f"mlp.{ours}" for theirs, ours in LAYER.items()},
    }
)
# Made by the release's constructor, and used by no forward pass.
UNUSED = ("pos_embedding", "cls_token", "to_patch_embedding_cnn.0.weight", "to_patch_embedding_cnn.0.bias")
# A buffer, the share of the old memory in the moving average.
_DECAY = "memoryupdate.beta"
_BLOCK_NAME = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema", "module")
_PREFIXES = ("module.", "_orig_mod.")
# Names of models that the release can make and this package has no counterpart of.
_OTHER_MODELS = (
    (r"fn\.net\.\d", "the release's ViT (its option --sparse), with a class token, positions and a mean or class head"),
    (r"fn\.hopfield\.", "an AiT whose Hopfield layer has projections of its own (the release's option --static)"),
    (r"fn\.mha_hn\.", "an AiT that reads by multi-head attention (HN = False in the release)"),
)


class Converted(NamedTuple):
    """A model or layer of this package.

    ``config["arguments"]`` makes it, ``state_dict`` goes into it, and ``dropped`` are the tensors, by their old names,
    that it has no use for.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    dropped: dict[str, Tensor]


def convert_released(
    checkpoint: Mapping[str, Any],
    *,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    head_dim: int = 64,
    top_k: int = 512,
    beta: float = 1.0,
    ignore_unknown: bool = False,
) -> Converted:
    """Converts a state dict of an AiT that was trained with the authors' code.

    Depth, widths, slots, heads of the memory, classes, patches, the question's width and the decay of the memory are
    read off the tensors. The rest is no part of a checkpoint; defaults are the release's.

    Args:
        checkpoint: names and tensors, also inside ``{"state_dict": ...}`` and the like or behind ``module.``.
        img_size: height and width in pixels, or one number for both; the square that the head's width tells by
            default.
        in_chans: channels of an image; with it, the patch size is known.
        head_dim: width of a head of self-attention.
        top_k: the release's ``--bottleneck``, tokens that a row of the memory lets in. It matters in evaluation, too,
            since the memory moves then. The release runs one pool on each GPU.
        beta: the release's ``--beta``, inverse temperature of the retrieval.
        ignore_unknown: drop tensors of unknown names instead of refusing them.

    Returns:
        ``(config, state_dict, dropped)``, of an :class:`~ait.models.ait.AssociativeTransformer` with
        ``semantics="released"``; dtypes as in the checkpoint.

    Raises:
        TypeError: the checkpoint is no mapping.
        ValueError: it is of another model, lacks tensors, has unknown ones or some of unexpected shapes.

    Example:
        >>> config, state_dict, dropped = convert_released(torch.load("ait_cifar10_small.pth", weights_only=True))
        >>> model = ait.create_model("ait_small", semantics="released", top_k=512)
        >>> model.load_state_dict(state_dict)

    Source: the released code of Sun et al., arXiv 2309.12862.
    """
    tensors = _unwrap(checkpoint)
    _check_is_ait(tensors)
    names, blocks, unknown = _match(tensors)
    dropped = {name: tensors[name] for name in UNUSED if name in tensors}
    if unknown and not ignore_unknown:
        cure = "ignore_unknown=True (--ignore-unknown) drops them"
        raise op_error(_NAME, "the names of the released AiT alone", f"also {_list(unknown)}; {cure}")
    dropped |= {name: tensors[name] for name in unknown}

    arguments = _sizes(tensors, blocks, in_chans, img_size)
    arguments |= {"in_chans": in_chans, "head_dim": head_dim, "top_k": top_k, "beta": beta, "semantics": "released"}
    arguments["dtype"] = _dtype(tensors[theirs] for theirs in names)
    try:
        with torch.device("meta"):
            model = AssociativeTransformer(**arguments)
    except ValueError as error:
        raise ValueError(f"{_NAME}: the checkpoint's sizes make no model: {error}") from error
    width, heads = arguments["slot_dim"], arguments["workspace_heads"]
    state = {ours: _convert(ours, tensors[theirs], width, heads) for theirs, ours in names.items()}
    state |= {f"blocks.{i}.mlp.workspace.memory.skipped_updates": torch.tensor(0) for i in range(blocks)}
    shapes = model.state_dict()
    if missing := [name for name in shapes if name not in state]:
        theirs = {ours: old for old, ours in _all_names(blocks).items()}
        raise op_error(_NAME, "every tensor of the released AiT", f"none named {_list(theirs[n] for n in missing)}")
    if found := shape_differences(shapes, state):
        raise ValueError(f"{_NAME}: expected tensors of a released AiT, got {shorten(found)}")
    return Converted(config_of(model), state, dropped)


def convert_released_layer(
    state_dict: Mapping[str, Tensor], *, top_k: int = 512, beta: float = 1.0, ignore_unknown: bool = False
) -> Converted:
    """Converts the state dict of one of the release's workspace layers (its ``ModularNN``).

    Args:
        state_dict: names and tensors.
        top_k: as in :func:`convert_released`, and so are the other two.
        beta: inverse temperature of the retrieval.
        ignore_unknown: drop tensors of unknown names instead of refusing them.

    Returns:
        ``(config, state_dict, dropped)`` for ``GlobalWorkspaceLayer(**config["arguments"])``.

    Raises:
        TypeError: it is no mapping; ValueError: it lacks tensors, or has unknown or misshapen ones.
    """
    tensors = _unwrap(state_dict)
    unknown = [name for name in tensors if name not in (*LAYER, _DECAY)]
    if unknown and not ignore_unknown:
        raise op_error(_NAME, "the names of a released layer alone", f"also {_list(unknown)}")
    if missing := [name for name in LAYER if name not in tensors]:
        raise op_error(_NAME, "every tensor of a released layer", f"none named {_list(missing)}")
    sizes = _layer_sizes(tensors, "")
    arguments = {
        "dim": sizes.pop("embed_dim"),
        "num_heads": sizes.pop("workspace_heads"),
        **sizes,
        "top_k": top_k,
        "beta": beta,
        "semantics": "released",
        "dtype": _dtype(tensors[name] for name in LAYER),
    }
    width, heads = arguments["slot_dim"], arguments["num_heads"]
    state = {ours: _convert(ours, tensors[theirs], width, heads) for theirs, ours in LAYER.items()}
    state["workspace.memory.skipped_updates"] = torch.tensor(0)
    dropped = {name: tensors[name] for name in unknown}
    return Converted({"architecture": "GlobalWorkspaceLayer", "arguments": arguments}, state, dropped)


def regroup_heads(weight: Tensor, slot_dim: int, num_heads: int) -> Tensor:
    """``W_O`` of the release, ``(D, D * S)`` with the head fastest, as ``(D, S * D)`` with the slot's width fastest."""
    return weight.reshape(slot_dim, slot_dim, num_heads).transpose(1, 2).flatten(1)


def _convert(ours: str, tensor: Tensor, slot_dim: int, num_heads: int) -> Tensor:
    is_out = ours.endswith("workspace.writer.out.weight") and tensor.shape == (slot_dim, slot_dim * num_heads)
    return regroup_heads(tensor, slot_dim, num_heads) if is_out else tensor


def _unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the prefixes of wrappers."""
    found = checkpoint
    for _ in range(3):
        if not isinstance(found, Mapping):
            raise TypeError(f"{_NAME}: expected a state dict, names and tensors, got {type(found).__name__}")
        if is_state_dict(found):
            break
        inner = [key for key in _WRAPPERS if isinstance(found.get(key), Mapping)]
        if not inner:
            break
        found = found[inner[0]]
    if "param_groups" in found:
        raise op_error(_NAME, "the state dict of a model", "that of an optimiser (the release's opt_*.pth)")
    if not is_state_dict(found):
        others = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
        raise op_error(_NAME, "a state dict, names and tensors", f"entries that are no tensors: {_list(others)}")
    if not found:
        raise op_error(_NAME, "a state dict, names and tensors", "an empty one")
    tensors = dict(found)
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_is_ait(tensors: Mapping[str, Tensor]) -> None:
    for pattern, what in _OTHER_MODELS:
        if found := [name for name in tensors if re.search(pattern, name)]:
            raise op_error(_NAME, "a released AiT with a static Hopfield layer", f"{what}: {_list(found)}")
    if "memoryupdate.memory" in tensors:
        raise op_error(_NAME, "a whole model", "one workspace layer, which convert_released_layer converts")
    if not any(_BLOCK_NAME.fullmatch(name) for name in tensors):
        raise op_error(_NAME, "names such as transformer.layers.0.1.fn.fc1.weight", _list(tensors))


def _match(tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], int, list[str]]:
    """Old names to new ones, the number of blocks, and names that are in no table."""
    indices = {int(match[1]) for name in tensors if (match := _BLOCK_NAME.fullmatch(name))}
    blocks = len(indices)
    if indices != set(range(blocks)):
        raise op_error(_NAME, f"blocks 0 to {blocks - 1}", f"blocks {_list(map(str, sorted(indices)))}")
    known = _all_names(blocks)
    aside = {*UNUSED, *(f"transformer.layers.{i}.{_LAYER_PREFIX}{_DECAY}" for i in range(blocks))}
    unknown = [name for name in tensors if name not in known and name not in aside]
    return {name: known[name] for name in known if name in tensors}, blocks, unknown


def _all_names(blocks: int) -> dict[str, str]:
    of_blocks = {
        f"transformer.layers.{i}.{theirs}": f"blocks.{i}.{ours}"
        for i in range(blocks)
        for theirs, ours in BLOCK.items()
    }
    return {**SHELL, **of_blocks}


def _sizes(
    tensors: Mapping[str, Tensor], blocks: int, in_chans: int, img_size: int | tuple[int, int] | None
) -> dict[str, Any]:
    """Arguments of the model that its tensors tell."""
    sizes = _layer_sizes(tensors, f"transformer.layers.0.{_LAYER_PREFIX}")
    for i in range(1, blocks):
        other = _layer_sizes(tensors, f"transformer.layers.{i}.{_LAYER_PREFIX}")
        if other != sizes:
            raise op_error(_NAME, f"blocks of one size, {sizes}", f"{other} in block {i}")
    width = sizes["embed_dim"]
    inner = _shape(tensors, "transformer.layers.0.0.fn.to_qkv.weight", 2)[0]
    if inner != 3 * width:
        raise op_error(_NAME, f"self-attention {width} wide inside, {3 * width} rows of to_qkv", inner)

    check_positive_int(_NAME, "in_chans", in_chans)
    pixels = _shape(tensors, "to_patch_embedding.1.weight", 1)[0]
    patch_size = math.isqrt(pixels // in_chans)
    if patch_size**2 * in_chans != pixels:
        raise op_error(_NAME, f"square patches of {in_chans} channels (in_chans)", f"patches of {pixels} entries")
    sizes |= {"depth": blocks, "patch_size": patch_size}
    sizes["num_classes"] = _shape(tensors, "mlp_head.1.weight", 2)[0]
    if "question_to_embedding.1.weight" in tensors:
        sizes["question_dim"] = _shape(tensors, "question_to_embedding.1.weight", 2)[1]
    entries = _shape(tensors, "mlp_head.0.weight", 1)[0]
    num_patches = entries // width - ("question_dim" in sizes)
    side = math.isqrt(max(num_patches, 0))
    if img_size is None:
        if side < 1 or side**2 != num_patches or entries % width:
            cure = "img_size says what images these were"
            raise op_error(_NAME, "a square image", f"a head on {entries} entries, {entries / width:g} tokens; {cure}")
        img_size = side * patch_size
    sizes["img_size"] = img_size
    return sizes


def _layer_sizes(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    hidden, width = _shape(tensors, f"{prefix}fc1.weight", 2)
    slots, slot_dim = _shape(tensors, f"{prefix}memoryupdate.memory", 2)
    rows = _shape(tensors, f"{prefix}memoryupdate.mha.w_qs.weight", 2)[0]
    if slot_dim < 1 or rows % slot_dim or not rows:
        raise op_error(_NAME, f"w_qs with a multiple of {slot_dim} rows, the slots' width", rows)
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "hidden_dim": hidden,
        "num_slots": slots,
        "slot_dim": slot_dim,
        "workspace_heads": rows // slot_dim,
    }
    if (decay := tensors.get(prefix + _DECAY)) is not None:
        # Not rounded: 1 - float32(0.9) is what the release multiplies by.
        sizes["alpha"] = 1 - float(_number(decay, prefix + _DECAY))
    return sizes


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        raise op_error(_NAME, "every tensor of the released AiT", f"none named {name}")
    if tensors[name].dim() != dims:
        raise op_error(_NAME, f"{name} of {dims} dimensions", tuple(tensors[name].shape))
    return tuple(tensors[name].shape)


def _number(tensor: Tensor, name: str) -> float:
    if tensor.numel() != 1:
        raise op_error(_NAME, f"one number in {name}", tuple(tensor.shape))
    return float(tensor)


def _dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The widest dtype, so that no weight is rounded."""
    dtypes = {tensor.dtype for tensor in tensors}
    if others := [str(dtype) for dtype in dtypes if not dtype.is_floating_point]:
        raise op_error(_NAME, "weights of a floating-point dtype", _list(others))
    return reduce(torch.promote_types, dtypes)


def _list(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f", ... ({len(listed)} in all)" if len(listed) > 8 else "")
