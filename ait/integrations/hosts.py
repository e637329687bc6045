"""Where a workspace can go in a model that others built, found by looking at its modules.

No library is imported and no version is asked for: a block is a member of a list of modules that has an MLP of its
own, under one of the few names and layouts that such MLPs have.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ait.integrations.causal import causal_reason

# Children that are a whole MLP: its input is x, its output y.
WHOLE = ("mlp", "ffn", "feed_forward", "feedforward", "DenseReluDense")
# Pairs of children: the first takes x, the second gives y. Where the second adds the residual itself (older
# transformers), y is what its dropout returns.
SPLIT = (("intermediate", "output"), ("ffn", "ffn_output"), ("fc1", "fc2"))
FEED_FORWARD_HINTS = ("mlp", "ffn", "feed", "fc", "linear", "intermediate")
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token")
REGISTER_TOKENS = ("register_tokens", "reg_token", "storage_tokens")
# What a model itself takes, and not a module within it.
MODEL_INPUTS = ("input_ids", "pixel_values", "patch_coord")
# Its arguments that are 0 or False where a token is padding.
PADDING_ARGUMENTS = ("attention_mask", "pixel_attention_mask", "patch_valid")


class Place(NamedTuple):
    """An MLP that has room for a workspace, as paths below its block."""

    block: nn.Module
    input_path: str  # of the module whose input is x
    output_path: str  # of the module whose output is y
    dim_in: int
    dim_out: int
    channels_first: bool
    linears: tuple[nn.Module, ...]

    @property
    def input_module(self) -> nn.Module:
        return self.block.get_submodule(self.input_path)

    @property
    def output_module(self) -> nn.Module:
        return self.block.get_submodule(self.output_path)

    @property
    def is_offloaded(self) -> bool:
        """Whether weights come from elsewhere when they are needed (accelerate's hooks)."""
        return any(hasattr(linear, "_hf_hook") and next(linear.parameters()).is_meta for linear in self.linears)

    @property
    def is_split(self) -> bool:
        return self.input_path != self.output_path


class Block(NamedTuple):
    """A block of a host; ``place`` is None where it has none, and ``reason`` says why."""

    name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]  # from its parent up to the model
    place: Place | None
    reason: str

    @property
    def class_name(self) -> str:
        return type(self.module).__name__

    def why_causal(self) -> str | None:
        """What shows that tokens must not see later ones; None if nothing does."""
        return causal_reason(self.module, self.ancestors)

    def prefix_tokens(self) -> int | None:
        """How many class and register tokens stand before the others; None if nothing tells."""
        for ancestor in self.ancestors:
            if any(_attends_for_class_token(module) for module in ancestor.modules()):
                return 0  # the class token comes after these blocks
            declared = getattr(ancestor, "num_prefix_tokens", None)
            if isinstance(declared, int):
                return declared
            embeddings = getattr(ancestor, "embeddings", None)
            owners = (ancestor, embeddings) if isinstance(embeddings, nn.Module) else (ancestor,)
            count = sum(_count_prefix(owner) for owner in owners)
            if count:
                return count
        return None

    def padding_argument(self) -> tuple[nn.Module, str, int] | None:
        """The nearest model around, if it is told about padding: it, the argument's name and its position.

        Modules within a model take masks under the same names that are something else.
        """
        for ancestor in self.ancestors:
            names = _parameters_of_forward(ancestor)
            if any(name in names for name in MODEL_INPUTS):
                argument = next((name for name in PADDING_ARGUMENTS if name in names), None)
                return None if argument is None else (ancestor, argument, names.index(argument))
        return None


def find_blocks(model: nn.Module) -> list[Block]:
    """Blocks of ``model`` that have an MLP, or should have one, in the order of its modules.

    Blocks that work on the class token alone (class attention) are none, and neither are heads and pooling.
    """
    blocks: list[Block] = []
    for name, module, ancestors in _walk(model):
        around = [block for block in blocks if block.module in ancestors]
        if any(block.place is None for block in around):
            continue  # what a block without a place consists of
        if not _is_listed(name) or _is_pooling(module) or _attends_for_class_token(module):
            continue
        place, reason = _find_place(module)
        if place is None and not reason and not around and _has_attention(module) and _hints_at_feed_forward(module):
            reason = "its feed-forward is parallel to the attention, fused with it, or laid out in an unknown way"
        if place is None and not reason:
            continue
        # A whole model with an MLP for its head may be a member of a list, too.
        blocks = [block for block in blocks if block not in around]
        blocks.append(Block(name, module, ancestors, place, reason))
    return blocks


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Every module below ``model`` with its name and ancestors, in order; shared ones once."""
    seen: set[int] = set()

    def walk(
        module: nn.Module, prefix: str, ancestors: tuple[nn.Module, ...]
    ) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
        for name, child in module.named_children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            yield f"{prefix}{name}", child, (module, *ancestors)
            yield from walk(child, f"{prefix}{name}.", (module, *ancestors))

    return walk(model, "", ())


def _is_listed(name: str) -> bool:
    """Whether the module is a member of a list, or a child of one: ``blocks.3``, ``layers.0.attn_block``."""
    return any(part.split("_")[-1].isdigit() for part in name.split(".")[-2:])


def _is_pooling(module: nn.Module) -> bool:
    return "Pool" in type(module).__name__


def _attends_for_class_token(module: nn.Module) -> bool:
    return any("ClassAtt" in type(child).__name__ for child in module.children())


def _has_attention(module: nn.Module) -> bool:
    named = any("att" in name.lower() for name, _ in module.named_children())
    return named and any(_widths(part) is not None for part in module.modules())


def _hints_at_feed_forward(module: nn.Module) -> bool:
    return any(hint in name for name, _ in module.named_children() for hint in FEED_FORWARD_HINTS)


def _find_place(block: nn.Module) -> tuple[Place | None, str]:
    """The place in ``block``, or why its MLP is none; neither where it has no MLP."""
    children = dict(block.named_children())
    for first, last in SPLIT:
        if first in children and last in children and _has_attention(block):
            inner = dict(children[last].named_children())
            output = next((f"{last}.{name}" for name in ("dropout", "dense") if name in inner), last)
            return _measure(block, first, output, (children[first], children[last]))
    for name in WHOLE:
        if name in children and not isinstance(children[name], nn.Identity):
            return _measure(block, name, name, (children[name],))
    return None, ""


def _measure(block: nn.Module, first: str, last: str, parts: tuple[nn.Module, ...]) -> tuple[Place | None, str]:
    for path, part in ((path, part) for module in parts for path, part in module.named_modules()):
        if path.split(".")[-1] in ("experts", "router") or "MoE" in type(part).__name__.replace("Moe", "MoE"):
            return None, f"its MLP, {type(parts[0]).__name__}, is a mixture of experts"
    linears = [linear for part in parts for linear in _linears(part)]
    if not linears:
        return None, f"its MLP, {type(parts[0]).__name__}, has no linear layers whose widths could be read"
    (dim_in, _), (_, dim_out) = _known_widths(linears[0]), _known_widths(linears[-1])
    channels_first = isinstance(linears[-1], nn.Conv2d)
    return Place(block, first, last, dim_in, dim_out, channels_first, tuple(linears)), ""


def _linears(module: nn.Module) -> list[nn.Module]:
    """Linear layers and 1x1 convolutions, outermost ones (an adapter around a Linear counts as one)."""
    if _widths(module) is not None:
        return [module]
    return [linear for child in module.children() for linear in _linears(child)]


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of what is a linear layer for each token alone."""
    if isinstance(module, nn.Conv2d):
        pointwise = tuple(module.kernel_size) == (1, 1) and module.groups == 1
        return (module.in_channels, module.out_channels) if pointwise else None
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(width, int) for width in widths):
        return None
    return widths  # type: ignore[return-value]


def _known_widths(module: nn.Module) -> tuple[int, int]:
    widths = _widths(module)
    assert widths is not None
    return widths


def _count_prefix(owner: nn.Module) -> int:
    own = dict(owner.named_parameters(recurse=False)) | dict(owner.named_buffers(recurse=False))
    tokens: list[Tensor] = [own[name] for name in (*CLASS_TOKENS, *REGISTER_TOKENS) if name in own]
    return sum(token.shape[-2] if token.dim() > 1 else 1 for token in tokens)


def _parameters_of_forward(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a forward written in C has no signature
        return []
