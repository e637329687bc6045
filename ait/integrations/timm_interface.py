"""The models of ``ait`` with the methods that timm expects of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from timm.layers import DropPath
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ait.models.ait import AssociativeTransformer
from ait.models.pretrained import WEIGHTS_DIR, list_pretrained, load_pretrained
from ait.models.registry import _options
from ait.models.shell import TransformerShell
from ait.models.vit import VisionTransformer
from ait.nn._validate import check_choice, check_number, suggest
from ait.nn.block import Block
from ait.ops._checks import op_error

POOLS = ("flatten", "")
OUTPUT_FORMATS = ("NCHW", "NLC")


class TimmInterface(TransformerShell):
    """What a model of timm can do, for models of this package: the same names of parameters, the same logits.

    The head reads every token at its place, so there are two kinds of ``global_pool``: ``"flatten"``, the published
    head, and ``""`` for the tokens themselves, with ``num_classes=0``. For the same reason the image size is fixed
    when the model is made.

    Args:
        global_pool: ``"flatten"`` or ``""``.
        drop_rate: dropout of what the last Linear reads, 0 in the published models.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first. An image's residual
            is dropped; what it writes into the memory is not.
        **model: arguments of the model's class in ``ait.models``, all but ``question_dim``.

    Raises:
        TypeError: an unknown argument; ValueError: an argument is not as above.
    """

    global_pool = "flatten"
    num_prefix_tokens = 0

    def __init__(
        self, *, global_pool: str = "flatten", drop_rate: float = 0.0, drop_path_rate: float = 0.0, **model: Any
    ) -> None:
        name = type(self).__name__
        if model.get("question_dim") is not None:
            cure = "question_dim=None; models that read a question come from ait.create_model"
            raise op_error(name, cure, model["question_dim"])
        known = _options(type(self)) - {"question_dim"}
        for option in model:
            if option not in known | {"question_dim"}:
                raise TypeError(f"{name}: no option {option!r}; {suggest(option, sorted(known))}")
        drop_rate = check_number(name, "drop_rate", drop_rate, "[0, 1]")
        drop_path_rate = check_number(name, "drop_path_rate", drop_path_rate, "[0, 1)")
        super().__init__(**model)
        self.reset_classifier(self.num_classes, global_pool)
        self.in_chans = self.patch_embed.in_chans
        self.grad_checkpointing = False
        self.drop_rate = drop_rate
        self.head_drop = nn.Dropout(drop_rate)
        depth = len(self.blocks)
        if drop_path_rate > 0:
            last = max(depth - 1, 1)
            self.blocks = nn.ModuleList(
                DropPathBlock(cast(Block, block), drop_path_rate * number / last)
                for number, block in enumerate(self.blocks)
            )
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=self.embed_dim, reduction=self.patch_embed.patch_size)
            for i in range(depth)
        ]

    @property
    def head_hidden_size(self) -> int:
        """Width of what :meth:`forward_head` returns without a classifier."""
        return self.embed_dim * (self.num_tokens if self.global_pool else 1)

    def forward_features(self, images: Tensor, question: Tensor | None = None) -> Tensor:
        """Tokens after the last block, *before* the head's LayerNorm, ``(B, N, E)``; ``question`` must be None."""
        if question is not None:
            self._embed_question(question, batch=images.shape[0])  # says that there is none
        x: Tensor = self.patch_embed(images)
        for block in self.blocks:
            x = self._run(block, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Tokens after chosen blocks, as timm's Vision Transformer gives them.

        Args:
            x: images ``(B, C, H, W)``.
            indices: the last so many blocks, or these blocks (negative ones count from the end); None for all.
            return_prefix_tokens: changes nothing, as in timm where there are no class tokens.
            norm: apply the head's LayerNorm, which normalises all tokens of an image as one vector.
            stop_early: leave out the blocks after the last chosen one. The final features are then that one's.
            output_fmt: ``"NCHW"``, ``(B, E, H / p, W / p)``, or ``"NLC"``, ``(B, N, E)``.
            intermediates_only: return the list alone.
            output_dict: return a dict of ``image_intermediates`` and ``image_features``.

        Returns:
            The final features ``(B, N, E)``, as :meth:`forward_features` gives them, and the list; or as above.

        Raises:
            ValueError: there is no such block or format.
        """
        check_choice(type(self).__name__, "output_fmt", output_fmt, OUTPUT_FORMATS)
        taken = self._take(indices)
        blocks = self.blocks[: max(taken) + 1] if stop_early else self.blocks
        intermediates = []
        tokens: Tensor = self.patch_embed(x)
        for number, block in enumerate(blocks):
            tokens = self._run(block, tokens)
            if number in taken:
                intermediates.append(self._normalize(tokens) if norm else tokens)
        if output_fmt == "NCHW":
            rows, columns = self.patch_embed.grid_size
            intermediates = [
                each.transpose(1, 2).reshape(x.shape[0], self.embed_dim, rows, columns) for each in intermediates
            ]
        if output_dict:
            features = {} if intermediates_only else {"image_features": tokens}
            return {"image_intermediates": intermediates, **features}
        return intermediates if intermediates_only else (tokens, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks after the last chosen one and, if wished, the head's LayerNorm and its Linear.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: whether the head's LayerNorm goes.
            prune_head: whether its Linear goes.

        Returns:
            The chosen blocks, counted from the first.
        """
        taken = self._take(indices)
        self.blocks = self.blocks[: max(taken) + 1]
        if prune_norm:
            self.head_norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Classifies the tokens ``(B, N, E)`` of :meth:`forward_features`.

        Args:
            features: the tokens.
            pre_logits: return what the last Linear would read.

        Returns:
            Logits ``(B, num_classes)``, or ``(B, N * E)`` without a classifier; with ``global_pool=""`` the tokens.

        Raises:
            ValueError: ``features`` has another shape.
        """
        flat = super().forward_head(features, pre_logits=True)
        if not self.global_pool:
            return features
        flat = self.head_drop(flat)
        return flat if pre_logits else self.head(flat)

    def get_classifier(self) -> nn.Module:
        """The last Linear; an ``nn.Identity`` with ``num_classes=0``."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new last Linear in place.

        Args:
            num_classes: number of logits; 0 puts none.
            global_pool: ``"flatten"`` or ``""``; None keeps what there is.

        Raises:
            ValueError: ``global_pool`` is none of these, or does not go with ``num_classes``.
        """
        name = type(self).__name__
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLS:
            expected = "global_pool 'flatten' (the head reads every token at its place) or ''"
            raise op_error(name, expected, repr(pool))
        if num_classes and not pool:
            raise op_error(
                name, "num_classes=0 with global_pool=''; a classifier needs global_pool='flatten'", num_classes
            )
        if num_classes and not isinstance(self.head_norm, nn.LayerNorm):
            raise op_error(name, "a model whose head was not pruned; make it anew", f"num_classes={num_classes}")
        if num_classes:
            super().reset_classifier(num_classes)
        else:
            self.num_classes, self.head = 0, nn.Identity()
        self.global_pool = pool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations inside blocks are computed again in the backward pass instead of being kept."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for layer-wise learning rates: patches, each block, head (what is not named)."""
        return {"stem": r"^patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def no_weight_decay(self) -> set[str]:
        """Learned memories, whose rows are normalised when they are read. (Others are no parameters.)"""
        return {name for name, _ in self.named_parameters() if name.endswith("memory.gamma")}

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Loads a file for timm's ``pretrained=True``: shipped weights are checked, others go through timm.

        Raises:
            ValueError: shipped weights do not fit, or their file is altered.
        """
        path = Path(checkpoint_path)
        name = path.stem.replace("-", ".")
        if path.parent == WEIGHTS_DIR and name in list_pretrained():
            load_pretrained(self, name)
        else:
            load_checkpoint(self, str(checkpoint_path))

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return out

    def _normalize(self, tokens: Tensor) -> Tensor:
        normalized: Tensor = self.head_norm(tokens.flatten(1))
        return normalized.reshape(tokens.shape)

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        """Numbers of blocks, in the order in which they are asked for."""
        depth, name = len(self.blocks), type(self).__name__
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 0 < indices <= depth:
                raise op_error(name, f"indices as a number of blocks from 1 to {depth}, or a list of them", indices)
            return list(range(depth - indices, depth))
        taken = [number + depth if number < 0 else number for number in indices]
        if not taken or not all(0 <= number < depth for number in taken):
            raise op_error(name, f"indices of blocks from 0 to {depth - 1}", list(indices))
        return taken


class DropPathBlock(Block):
    """A block with stochastic depth: in training, each residual is left out for a share of the images.

    Args:
        block: whose modules it takes over, names included.
        rate: the share, in [0, 1). What is kept is scaled by ``1 / (1 - rate)``.

    Source: Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """

    def __init__(self, block: Block, rate: float) -> None:
        nn.Module.__init__(self)
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, E)`` to ``(B, N, E)``."""
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TimmAssociativeTransformer(TimmInterface, AssociativeTransformer):
    """:class:`ait.AssociativeTransformer` as a model of timm; see :class:`TimmInterface`."""


class TimmVisionTransformer(TimmInterface, VisionTransformer):
    """:class:`ait.VisionTransformer` as a model of timm; see :class:`TimmInterface`."""
