"""The modules that insertion puts into a host: a gated workspace beside the host's own MLP, or the published layer."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ait.integrations.masks import TokenMask
from ait.nn._validate import check_choice, check_dtype, replica_error
from ait.nn.workspace import GlobalWorkspace, GlobalWorkspaceLayer
from ait.ops._checks import check_positive_int, op_error

GATED_MODES = ("wrap", "parallel")
CHILD_NAME = "global_workspace"  # the child that a host's block gains in the gated modes


class Insertion(NamedTuple):
    """How a module came into its host.

    Args:
        layer: number of the block, in forward order.
        block_class: class name of the block.
        host_parameters: parameters of the block's own MLP.
        host_flops: floating-point operations of its matrix products, a token.
        arguments: of :func:`ait.insert_workspace`, as JSON has them; the same for all layers of a host.
    """

    layer: int
    block_class: str
    host_parameters: int
    host_flops: int
    arguments: dict[str, Any]


class InsertedWorkspace(nn.Module):
    """A workspace behind a gate that starts closed, for a block that keeps its own MLP.

    ``"wrap"``: ``y + g * retrieve(LN(y))`` with ``y = mlp(x)``. ``"parallel"``: ``y + g * retrieve(LN(x))``. The gate
    ``g`` is one number, 0 at first, so a host computes what it did before: the same logits, bit for bit. (Where ``y``
    is not finite, it stays so; which kind may change, since ``0 * inf`` is NaN. Finite tokens are always retrieved
    finite.) With the first optimiser step the gate opens, and from the second on every parameter learns.

    Args:
        dim: token width ``E`` (in ``"parallel"``, of input and output alike).
        mode: ``"wrap"`` or ``"parallel"``.
        channels_first: whether the host's tensors are ``(B, E, *)`` instead of ``(B, *, E)``.
        mask: which tokens do not write; none by default.
        device: device of parameters and buffers.
        dtype: dtype of the parameters; the memory has float32 at least.
        **options: of :class:`ait.GlobalWorkspace`. ``write_dropout`` is 0 by default, so that an insertion draws none
            of the random numbers that the host's own dropout would have drawn.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        dim: int,
        *,
        mode: Literal["wrap", "parallel"] = "wrap",
        channels_first: bool = False,
        mask: TokenMask | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name = "InsertedWorkspace"
        check_dtype(name, dtype)
        dim = check_positive_int(name, "dim", dim)
        self.mode = check_choice(name, "mode", mode, GATED_MODES)
        self.channels_first = channels_first
        self.mask = TokenMask() if mask is None else mask
        self.insertion: Insertion | None = None
        self.held = _Held()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.workspace = GlobalWorkspace(dim, device=device, dtype=dtype, **{"write_dropout": 0.0, **options})
        self.workspace.mask_is_ambient = True
        # One entry, not none: sharding wrappers take no parameter without dimensions.
        self.gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, y: Tensor, x: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Adds what the tokens retrieve to the output of the host's MLP.

        Args:
            y: ``(B, *, E)``, output of the MLP (``(B, E, *)`` with ``channels_first``).
            x: its input, of the same shape; needed in ``"parallel"`` alone.
            key_padding_mask: ``(B, *)`` bool, True = such tokens do not write; the host's own mask by default.

        Returns:
            The shape and dtype of ``y``.
        """
        source = y
        if self.mode == "parallel":
            if x is None:
                raise op_error("InsertedWorkspace", "x, the input of the MLP, in mode 'parallel'", None)
            source = x
        if self.channels_first:
            source = source.movedim(1, -1)
        if key_padding_mask is None and self.workspace.writes_now:
            key_padding_mask = self.mask.of(source)
        retrieved = self.gate * self.workspace(self.norm(source), key_padding_mask)
        if self.channels_first:
            retrieved = retrieved.movedim(-1, 1)
        return y + retrieved.to(y.dtype)

    def hold_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that takes ``x``, where another one gives ``y``."""
        self.held.x = _first(args, kwargs)

    def add_to_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """Forward hook of the module that gives ``y``."""
        if getattr(module, "_is_replica", False):
            raise replica_error("InsertedWorkspace")
        if not isinstance(output, Tensor):
            raise op_error("InsertedWorkspace", f"{type(module).__name__} to return a tensor", type(output).__name__)
        x = None
        if self.mode == "parallel":
            x, self.held.x = (_first(args, kwargs), None) if self.held.x is None else (self.held.x, None)
        return self(output, x)

    def reset_parameters(self) -> None:
        """Draws all parameters and the memory anew, and closes the gate."""
        reset_parameters(self)
        with torch.no_grad():
            self.gate.zero_()

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}" + (", channels_first=True" if self.channels_first else "")


class BlockHooks:
    """Hooks of a block's modules, for the workspace that is the block's child when they are called.

    It may be another than was put in: peft trains a copy of what it is told to save, and puts it there.

    Args:
        block: the block of the host.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def hold_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that takes ``x``, where another one gives ``y``."""
        getattr(self.block, CHILD_NAME).hold_input(module, args, kwargs)

    def add_to_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """Forward hook of the module that gives ``y``."""
        added: Tensor = getattr(self.block, CHILD_NAME).add_to_output(module, args, kwargs, output)
        return added


class InsertedLayer(nn.Module):
    """The published layer in the place of a host's MLP: :class:`ait.GlobalWorkspaceLayer` with the host's masks.

    Args:
        dim: token width ``E``.
        channels_first: whether the host's tensors are ``(B, E, *)`` instead of ``(B, *, E)``.
        mask: which tokens do not write; none by default.
        **options: of :class:`ait.GlobalWorkspaceLayer`.

    Raises:
        ValueError: an argument is not as above.
    """

    mode = "replace"

    def __init__(
        self, dim: int, *, channels_first: bool = False, mask: TokenMask | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.mask = TokenMask() if mask is None else mask
        self.insertion: Insertion | None = None
        # The name keeps fc1 and fc2 apart from those of a host's MLP, which libraries rename in checkpoints.
        self.global_workspace = GlobalWorkspaceLayer(dim, **options)
        self.workspace.mask_is_ambient = True

    @property
    def workspace(self) -> GlobalWorkspace:
        return self.global_workspace.workspace

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(B, *, E)`` to the same shape; what else a host hands to its MLP (a grid's size) is not needed."""
        if self.channels_first:
            x = x.movedim(1, -1)
        mask = self.mask.of(x) if self.workspace.writes_now else None
        y: Tensor = self.global_workspace(x, mask)
        return y.movedim(-1, 1) if self.channels_first else y

    def reset_parameters(self) -> None:
        """Draws all parameters and the memory anew."""
        reset_parameters(self)


def reset_parameters(module: nn.Module) -> None:
    """Initialises every part of a workspace as its constructor does."""
    for part in module.modules():
        if part is module:
            continue
        reset = getattr(part, "reset_parameters", None) or getattr(part, "reset", None)
        if callable(reset):
            reset()


class _Held:
    """The input of an MLP until its output is there. It belongs to a forward pass; copies are empty."""

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"x": None}


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
