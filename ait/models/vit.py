"""The Vision Transformer of the comparison: the same shell with an ordinary MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ait.models.shell import TransformerShell
from ait.nn.attention import Attention
from ait.nn.block import Block, Mlp
from ait.ops._checks import op_error


class VisionTransformer(TransformerShell):
    """ViT without class token and positional embedding, classified from the flattened tokens.

    Defaults are the base size. On CIFAR-10 with patch 4 it has 85,655,914 parameters at depth 12.

    Args:
        depth: number of blocks.
        embed_dim: width ``E`` of a token.
        head_dim: width of an attention head, which must divide ``embed_dim``.
        hidden_dim: width of the MLP; ``4 * embed_dim`` by default.
        attention: False leaves self-attention out (an ablation: tokens then meet in the head alone).
        device: device of the parameters.
        dtype: dtype of the parameters.
        **shell: ``img_size``, ``patch_size``, ``in_chans``, ``num_classes`` and ``question_dim`` of
            :class:`~ait.models.shell.TransformerShell`.

    Raises:
        ValueError: sizes do not fit together; TypeError: an unknown argument.

    Source: Dosovitskiy et al., arXiv 2010.11929, in the shell of arXiv 2309.12862.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 768,
        head_dim: int = 64,
        hidden_dim: int | None = None,
        attention: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **shell: Any,
    ) -> None:
        if not isinstance(attention, bool):
            raise op_error("VisionTransformer", "attention to be True or False", repr(attention))

        def make_block(num_tokens: int) -> nn.Module:
            return Block(
                embed_dim,
                attn=Attention(embed_dim, head_dim=head_dim, device=device, dtype=dtype) if attention else None,
                mlp=Mlp(embed_dim, hidden_dim=hidden_dim, device=device, dtype=dtype),
                device=device,
                dtype=dtype,
            )

        super().__init__(make_block, depth=depth, embed_dim=embed_dim, device=device, dtype=dtype, **shell)
