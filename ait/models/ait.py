"""The Associative Transformer: the ViT of the comparison with a global workspace layer in place of each MLP."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from ait.models.shell import TransformerShell
from ait.nn.attention import Attention
from ait.nn.block import Block
from ait.nn.workspace import GlobalWorkspaceLayer
from ait.ops._checks import op_error


class AssociativeTransformer(TransformerShell):
    """AiT: self-attention and a :class:`~ait.nn.workspace.GlobalWorkspaceLayer` in every block.

    Every layer has a memory of its own. Add ``ait.balance_loss(model)`` to the training loss. Defaults are the
    base size: on CIFAR-10 with patch 4, small, medium and base (2, 6 and 12 blocks) have 15,675,370, 45,767,914
    and 90,906,730 parameters plus memory entries.

    The ablations are arguments: ``attention=False`` (no self-attention), ``top_k_ratio=1.0`` (no bottleneck),
    ``reader="attention"`` (no Hopfield), ``balance_weight=0`` (no balance loss), ``memory="learned"`` or
    ``"fixed"`` (nothing is written). Without memory altogether AiT is
    :class:`~ait.models.vit.VisionTransformer`.

    Args:
        depth: number of blocks.
        embed_dim: width ``E`` of a token.
        head_dim: width of a self-attention head, which must divide ``embed_dim``.
        hidden_dim: width inside the feed-forward part of the layer; ``4 * embed_dim`` by default.
        attention: False leaves self-attention out; tokens then meet in the memory and in the head.
        num_slots: slots ``M`` of each memory. This and what follows are arguments of the layer; see there.
        slot_dim: width ``D`` of a slot, and of a workspace head.
        workspace_heads: the layer's ``num_heads``, ``S``; self-attention's follow from ``head_dim``.
        top_k: tokens that each row lets in.
        top_k_ratio: the same as a share of the tokens in the batch.
        memory: ``"ewma"``, ``"learned"`` or ``"fixed"``.
        semantics: ``"differentiable"`` or ``"released"``.
        reader: ``"hopfield"`` or ``"attention"``.
        alpha: share of the new in the moving average.
        beta: inverse temperature of the retrieval.
        steps: retrieval steps.
        tol: change of a token's state below which its retrieval stops.
        balance_weight: factor ``sigma`` of the balance loss.
        write_dropout: dropout of what is written.
        selection_dtype: dtype to which the bottleneck's operands are rounded.
        device: device of the parameters.
        dtype: dtype of the parameters; memories are at least float32.
        **shell: ``img_size``, ``patch_size``, ``in_chans``, ``num_classes`` and ``question_dim`` of
            :class:`~ait.models.shell.TransformerShell`.

    Raises:
        ValueError: sizes do not fit together, or the layer refuses an argument; TypeError: an unknown argument.

    Source: Sun et al., Associative Transformer, arXiv 2309.12862.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        embed_dim: int = 768,
        head_dim: int = 64,
        hidden_dim: int | None = None,
        attention: bool = True,
        num_slots: int = 32,
        slot_dim: int = 32,
        workspace_heads: int = 8,
        top_k: int | None = None,
        top_k_ratio: float | None = None,
        memory: Literal["ewma", "learned", "fixed"] = "ewma",
        semantics: Literal["differentiable", "released"] = "differentiable",
        reader: Literal["hopfield", "attention"] = "hopfield",
        alpha: float = 0.1,
        beta: float = 1.0,
        steps: int = 1,
        tol: float = 0.0,
        balance_weight: float = 1e-2,
        write_dropout: float = 0.1,
        selection_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **shell: Any,
    ) -> None:
        if not isinstance(attention, bool):
            raise op_error("AssociativeTransformer", "attention to be True or False", repr(attention))

        def make_block(num_tokens: int) -> nn.Module:
            workspace = GlobalWorkspaceLayer(
                embed_dim,
                hidden_dim=hidden_dim,
                num_slots=num_slots,
                slot_dim=slot_dim,
                num_heads=workspace_heads,
                top_k=top_k,
                top_k_ratio=top_k_ratio,
                memory=memory,
                semantics=semantics,
                reader=reader,
                alpha=alpha,
                beta=beta,
                steps=steps,
                tol=tol,
                balance_weight=balance_weight,
                write_dropout=write_dropout,
                selection_dtype=selection_dtype,
                device=device,
                dtype=dtype,
            )
            attn = Attention(embed_dim, head_dim=head_dim, device=device, dtype=dtype) if attention else None
            return Block(embed_dim, attn=attn, mlp=workspace, device=device, dtype=dtype)

        super().__init__(make_block, depth=depth, embed_dim=embed_dim, device=device, dtype=dtype, **shell)
