"""The shell of the published models: patches, blocks, and a head that reads every token at its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ait.models.sharing import Shareable
from ait.nn.patch_embed import PatchEmbed, TokenEmbed, check_like_parameters
from ait.ops._checks import check_positive_int, op_error


class TransformerShell(Shareable):
    """Patch embedding, a stack of blocks, and ``LN -> Linear`` on the flattened ``(N * E)`` tokens.

    There is no positional embedding, no class token and no dropout; LayerNorm eps is 1e-5. Models differ in
    their blocks alone. A relational model reads a question as one more token, in front of the patches.

    Parameters start as PyTorch initialises ``nn.Linear`` and ``nn.LayerNorm``, as the authors' code leaves them.
    ``torch.manual_seed`` before construction makes a model reproducible.

    Args:
        make_block: called ``depth`` times with the number of tokens of a sequence (patches, plus one with a
            question); each block maps ``(B, N, E)`` to the same shape, residuals included.
        depth: number of blocks.
        embed_dim: width ``E`` of a token.
        img_size: height and width in pixels, or one number for both; each a multiple of ``patch_size``.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        num_classes: number of logits; 0 leaves the last Linear out, so that the model returns ``(B, N * E)``.
        question_dim: entries of a question vector (18 for Sort-of-CLEVR); None for models of images alone.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: a size is no positive integer, or ``patch_size`` does not divide ``img_size``.

    Source: Sun et al., Associative Transformer, arXiv 2309.12862, and the released code.
    """

    def __init__(
        self,
        make_block: Callable[[int], nn.Module],
        *,
        depth: int,
        embed_dim: int,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        question_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive_int(name, "depth", depth)
        self.embed_dim = self.num_features = embed_dim
        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            device=device,
            dtype=dtype,
        )
        self.question_embed: TokenEmbed | None = None
        if question_dim is not None:
            check_positive_int(name, "question_dim", question_dim)
            self.question_embed = TokenEmbed(question_dim, embed_dim, device=device, dtype=dtype)
        self.question_dim = question_dim
        self.num_tokens = self.patch_embed.num_patches + (question_dim is not None)
        self.blocks = nn.ModuleList(make_block(self.num_tokens) for _ in range(depth))
        self.head_norm = nn.LayerNorm(self.num_tokens * embed_dim, device=device, dtype=dtype)
        self.reset_classifier(num_classes)

    def forward(self, images: Tensor, question: Tensor | None = None) -> Tensor:
        """Classifies a batch.

        Args:
            images: ``(B, C, H, W)``, normalised, in the dtype of the parameters.
            question: ``(B, question_dim)``, for models that were made with one.

        Returns:
            Logits ``(B, num_classes)``.

        Raises:
            TypeError: an input is no tensor.
            ValueError: an input has another shape, dtype or device, or a question is missing or not wanted.
        """
        return self.forward_head(self.forward_features(images, question))

    def forward_features(self, images: Tensor, question: Tensor | None = None) -> Tensor:
        """Tokens after the last block, *before* the head's LayerNorm.

        Args:
            images: as in :meth:`forward`.
            question: as in :meth:`forward`.

        Returns:
            ``(B, N, E)``, patches row by row; with a question ``(B, N + 1, E)``, the question first.
        """
        x = self.patch_embed(images)
        embedded_question = self._embed_question(question, batch=images.shape[0])
        if embedded_question is not None:
            x = torch.cat([embedded_question.unsqueeze(1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward_head(self, features: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Flattens the tokens, normalises them as one vector and classifies it.

        Args:
            features: ``(B, N, E)`` (``N + 1`` tokens with a question), of :meth:`forward_features`.
            pre_logits: return what the last Linear would read.

        Returns:
            Logits ``(B, num_classes)``, or ``(B, N * E)``.

        Raises:
            ValueError: ``features`` has another shape.
        """
        if features.dim() != 3 or features.shape[1:] != (self.num_tokens, self.embed_dim):
            expected = f"features of shape (B, {self.num_tokens}, {self.embed_dim})"
            raise op_error(type(self).__name__, expected, tuple(features.shape))
        flat: Tensor = self.head_norm(features.flatten(1))
        return flat if pre_logits else self.head(flat)

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new last Linear in place, with ``num_classes`` outputs; 0 puts none. The head's LayerNorm stays."""
        if num_classes != 0:
            check_positive_int(type(self).__name__, "num_classes", num_classes)
        weight = self.head_norm.weight
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(weight.numel(), num_classes, device=weight.device, dtype=weight.dtype)

    def _embed_question(self, question: Tensor | None, *, batch: int) -> Tensor | None:
        """Checks and embeds ``(B, question_dim)`` to ``(B, E)``; None for models of images alone."""
        name = type(self).__name__
        if self.question_embed is None:
            if question is not None:
                raise op_error(name, "no question (the model was made with question_dim=None)", _describe(question))
            return None
        expected = f"a question of shape ({batch}, {self.question_dim})"
        if question is None:
            raise op_error(name, expected, None)
        if not isinstance(question, Tensor):
            raise TypeError(f"{name}: expected the question as a torch.Tensor, got {_describe(question)}")
        if question.shape != (batch, self.question_dim):
            raise op_error(name, expected, tuple(question.shape))
        check_like_parameters(name, "question", question, self.question_embed.linear.weight)
        embedded: Tensor = self.question_embed(question)
        return embedded


def _describe(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
