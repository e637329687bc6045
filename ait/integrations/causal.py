"""Whether a block belongs to a causal decoder, where a shared pool of tokens would show each its future."""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor, nn

CAUSAL_MASK = re.compile("causal.*mask|mask.*causal")
SQUARE = 4096  # larger masks are not looked at


def causal_reason(block: nn.Module, ancestors: tuple[nn.Module, ...]) -> str | None:
    """What shows that tokens of ``block`` must not see later ones; None if nothing does.

    Looked at are the nearest config, what attention says of itself, stored triangular masks, and whether the modules
    around the block make a causal mask.

    Args:
        block: the block.
        ancestors: the modules around it, from its parent up to the model.
    """
    config = next((a.config for a in ancestors if hasattr(a, "config")), None)
    if getattr(config, "is_decoder", False) is True:
        return f"{type(config).__name__}.is_decoder is True"
    for part in (block, *block.modules()):
        for flag in ("is_causal", "is_decoder"):
            if getattr(part, flag, False) is True:
                return f"{type(part).__name__}.{flag} is True"
    for owner in (*block.modules(), *ancestors):
        for name, buffer in owner.named_buffers(recurse=False):
            if _is_triangular(buffer):
                return f"{type(owner).__name__} holds a causal mask, {name!r}"
    for ancestor in ancestors:
        names = _names_in_forward(ancestor)
        mask = next((name for name in names if CAUSAL_MASK.search(name)), None)
        # Encoders that can be made decoders ask first whether they are.
        if mask is not None and "is_decoder" not in names:
            return f"{type(ancestor).__name__}.forward calls {mask}"
    return None


def _is_triangular(mask: Tensor) -> bool:
    """Whether ``mask (..., n, n)`` hides what lies above its diagonal, and nothing else."""
    if mask.dim() < 2 or mask.is_meta or mask.is_sparse or mask.layout != torch.strided:
        return False
    size = mask.shape[-1]
    if mask.shape[-2] != size or not 2 <= size <= SQUARE or mask.numel() != size * size:
        return False
    mask = mask.detach().reshape(size, size)
    lower = torch.ones_like(mask, dtype=torch.bool).tril()
    if mask.is_floating_point():
        hidden = mask < -1e3
        return bool(torch.equal(hidden, ~lower)) or bool(torch.equal(mask, lower.to(mask.dtype)))
    return bool(torch.equal(mask.bool(), lower)) or bool(torch.equal(mask.bool(), ~lower))


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    function = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    return code.co_names if code is not None else ()
