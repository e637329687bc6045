"""The workspace layer as an argument of timm's models: ``mlp_layer=WorkspaceMlp`` or ``block_fn=WorkspaceBlock``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ait.integrations.inserted import reset_parameters
from ait.nn._validate import check_number, suggest
from ait.nn.workspace import GlobalWorkspaceLayer
from ait.ops._checks import check_positive_int, op_error

try:
    from timm.layers import Mlp
    from timm.models.vision_transformer import Block
except ImportError as error:
    raise ImportError(
        f"ait.integrations: cannot import timm's layers ({error}); timm 0.9.16 or later is needed: "
        "pip install 'associative-transformer[timm]'",
        name="timm",
    ) from error


class WorkspaceMlp(GlobalWorkspaceLayer):
    """:class:`ait.GlobalWorkspaceLayer` with the signature of ``timm.layers.Mlp``.

    ::

        timm.create_model("vit_small_patch16_224", mlp_layer=WorkspaceMlp)
        timm.create_model("deit3_small_patch16_224", mlp_layer=functools.partial(WorkspaceMlp, num_slots=64))

    The first arguments are timm's and mean what they mean there; what they choose for the MLP is done to the
    feed-forward part: ``f = LN(drop(fc2(norm(drop(act(fc1(x)))))))``. The rest are the layer's own. With timm's
    defaults and ``hidden_features`` of four times the width it is the published layer.

    ``fc1`` and ``fc2`` have the names and shapes of the MLP's, so a plain model's weights fill them:
    ``model.load_state_dict(timm.create_model(name, pretrained=True).state_dict(), strict=False)``. The LayerNorm after
    ``fc2`` is new, so such a model must be trained before it is good for anything; :func:`ait.insert_workspace` keeps a
    pretrained model's logits instead.

    timm hands no padding mask to an MLP: tokens of padding (NaFlexViT) would write like any other.

    Args:
        in_features: token width ``E``.
        hidden_features: width between ``fc1`` and ``fc2``; ``in_features`` by default, as in timm.
        out_features: None or ``in_features``; a workspace keeps the width.
        act_layer: makes the activation, without arguments.
        norm_layer: makes a normalisation of the hidden tokens, before ``fc2``; None for none.
        bias: whether ``fc1`` and ``fc2`` have one; a pair for one each.
        drop: dropout after the activation and after ``fc2``; a pair for one each.
        use_conv: must be False; for tokens ``(B, *, E)``, that is, channels last.
        device: device of parameters and buffers.
        dtype: dtype of the parameters; the memory has float32 at least.
        prefix_tokens: how many of the first tokens of ``(B, N, E)`` only read: class and register tokens that should
            not compete for the memory. 0 lets all write.
        **workspace: ``num_slots``, ``slot_dim``, ``num_heads`` (of the workspace), ``top_k``, ``top_k_ratio``,
            ``memory``, ``semantics``, ``reader``, ``alpha``, ``beta``, ``steps``, ``tol``, ``balance_weight``,
            ``write_dropout``, ``selection_dtype`` of :class:`ait.GlobalWorkspace`. (For a memory that is drawn from a
            seed, call ``ait.reset_memory(model, seed)`` once the model is made.)

    Raises:
        ValueError: an argument is not as above.
        TypeError: an unknown argument.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        prefix_tokens: int = 0,
        **workspace: Any,
    ) -> None:
        name = type(self).__name__
        _check_options(name, workspace, WORKSPACE_OPTIONS)
        if out_features and out_features != in_features:
            raise op_error(name, f"out_features None or in_features={in_features}", out_features)
        if use_conv:
            raise op_error(name, "use_conv=False (tokens with channels last; a workspace reads no NCHW maps)", use_conv)
        if not (act_layer is None or callable(act_layer)):
            raise op_error(name, "act_layer to be a class such as nn.GELU", repr(act_layer))
        if not (norm_layer is None or callable(norm_layer)):
            raise op_error(name, "norm_layer to be a class such as nn.LayerNorm, or None", repr(norm_layer))
        biases, drops = _pair(name, "bias", bias), _pair(name, "drop", drop)
        for probability in drops:
            check_number(name, "drop", probability, "[0, 1]")
        if prefix_tokens != 0:
            check_positive_int(name, "prefix_tokens", prefix_tokens)
        placement: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(in_features, hidden_dim=hidden_features or in_features, **placement, **workspace)
        self.prefix_tokens = prefix_tokens
        for linear, has_bias in zip((self.fc1, self.fc2), biases, strict=True):
            if not has_bias:
                linear.register_parameter("bias", None)
        self.act: nn.Module = nn.GELU() if act_layer is None else act_layer()
        self.hidden_norm: nn.Module = nn.Identity()
        if norm_layer is not None:
            self.hidden_norm = norm_layer(self.fc1.out_features).to(**placement)
        self.drop1, self.drop2 = (nn.Dropout(probability) for probability in drops)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, *, E)``, normalised by the block, to the same shape, without the block's residual.

        Raises:
            ValueError: shape, dtype or device of ``x`` does not fit.
        """
        y: Tensor = super().forward(x, self._prefix_mask(x))
        return y

    def feed_forward(self, x: Tensor) -> Tensor:
        """``f = LN(drop(fc2(norm(drop(act(fc1(x)))))))``, ``(B, *, E)`` to the same shape."""
        hidden = self.hidden_norm(self.drop1(self.act(self.fc1(x))))
        f: Tensor = self.norm(self.drop2(self.fc2(hidden)))
        return f

    def init_weights(self) -> None:
        """Draws the workspace anew, and its memory, as the constructor does; ``fc1`` and ``fc2`` stay.

        timm's Vision Transformers call this after they have drawn every Linear in their own way, the workspace's
        small ones too, whose logits would then start a few times smaller than the published ones.
        """
        reset_parameters(self.workspace)

    def reset_parameters(self) -> None:
        """Draws all parameters and the memory anew."""
        reset_parameters(self)

    def _prefix_mask(self, x: Tensor) -> Tensor | None:
        """``(B, N)``, True for prefix tokens; None where all tokens write."""
        if not self.prefix_tokens:
            return None
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] < self.prefix_tokens:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise op_error(
                "WorkspaceMlp", f"input (B, N, E) of at least prefix_tokens={self.prefix_tokens} tokens", got
            )
        return (torch.arange(x.shape[1], device=x.device) < self.prefix_tokens).expand(x.shape[:2])

    def extra_repr(self) -> str:
        return f"prefix_tokens={self.prefix_tokens}" if self.prefix_tokens else ""


class WorkspaceBlock(Block):
    """timm's Vision Transformer block with a :class:`WorkspaceMlp` for its MLP.

    ::

        timm.create_model("vit_small_patch16_224", block_fn=WorkspaceBlock)
        timm.create_model("vit_base_patch14_dinov2", block_fn=functools.partial(WorkspaceBlock, num_slots=64))

    It is the ``Block`` of whichever timm is installed and takes its arguments. For timm's other blocks pass both:
    ``block_fn=ResPostBlock, mlp_layer=WorkspaceMlp``.

    Args:
        dim: token width ``E``.
        num_heads: heads of self-attention.
        mlp_layer: timm's ``Mlp``, as its models give it, or a :class:`WorkspaceMlp`; also a ``partial`` of one, with
            keywords.
        workspace_heads: ``num_heads`` of the workspace.
        **options: other arguments of timm's ``Block``, and those that :class:`WorkspaceMlp` adds to timm's ``Mlp``.

    Raises:
        TypeError: an unknown argument, or another ``mlp_layer``, which would be lost.
        ValueError: the layer refuses an argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        workspace_heads: int | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        of_block = set(inspect.signature(Block.__init__).parameters) - {"self"}
        of_workspace = (WORKSPACE_OPTIONS | {"prefix_tokens"}) - {"num_heads"}
        _check_options(name, options, of_block | of_workspace | {"workspace_heads"})
        workspace = {option: options.pop(option) for option in of_workspace & options.keys()}
        if workspace_heads is not None:
            workspace["num_heads"] = workspace_heads
        made: Any = mlp_layer
        if isinstance(mlp_layer, functools.partial):
            made, workspace = mlp_layer.func, {**mlp_layer.keywords, **workspace}
        if made is Mlp:
            made = WorkspaceMlp
        elif not (isinstance(made, type) and issubclass(made, WorkspaceMlp)):
            raise TypeError(
                f"{name}: expected mlp_layer timm's Mlp or a WorkspaceMlp, got {getattr(made, '__name__', made)!r}, in "
                "whose place a WorkspaceMlp would come; to keep it, make the model without block_fn and call "
                "ait.insert_workspace(model)"
            )
        mlp: Any = functools.partial(made, **workspace)
        super().__init__(dim, num_heads, mlp_layer=mlp, **options)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``(B, N, E)`` to the same shape.

        Raises:
            ValueError: ``is_causal``: tokens of an image share the memory, so earlier ones would see later ones.
        """
        if is_causal:
            raise op_error(type(self).__name__, "is_causal=False (the workspace would show tokens later ones)", True)
        y: Tensor = super().forward(x) if attn_mask is None else super().forward(x, attn_mask=attn_mask)
        return y


WORKSPACE_OPTIONS = frozenset(inspect.signature(GlobalWorkspaceLayer).parameters) - {
    "dim",
    "hidden_dim",
    "device",
    "dtype",
    "generator",  # timm's initialisation comes after the constructor, and draws the memory again
}


def _check_options(name: str, given: dict[str, Any], known: set[str] | frozenset[str]) -> None:
    """Refuses arguments that no one would read."""
    for option in given:
        if option not in known:
            raise TypeError(f"{name}: no option {option!r}; {suggest(option, sorted(known))}")


def _pair(name: str, argument: str, value: Any) -> tuple[Any, Any]:
    """One for each of ``fc1`` and ``fc2``."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise op_error(name, f"{argument} as one value or a pair", repr(value))
    return pair
