"""The Global Workspace Layer: tokens of a whole batch compete to write a small memory, and all read it back.

Shape suffixes: ``B`` images, ``T`` tokens of the batch, ``E`` token width, ``M`` slots, ``D`` slot width,
``S`` heads, ``R = S*M`` rows, ``k`` tokens a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ait.nn._validate import (
    check_choice,
    check_dtype,
    check_input,
    check_number,
    check_padding_mask,
    replica_error,
)
from ait.nn.balance import KeptLoss
from ait.nn.injection import inject_gradient
from ait.nn.memory import MEMORIES, Memory
from ait.nn.readers import AttentionReader, HopfieldReader
from ait.nn.recompute import BalanceGradient, ForwardPass, ForwardRecords, pass_balance_gradient
from ait.nn.writer import BottleneckWriter
from ait.ops._checks import check_positive_int, is_positive_in, op_error
from ait.ops.balance_loss import balance_of
from ait.ops.hopfield_retrieve import MAX_STEPS

DEFAULT_TOP_K_RATIO = 1 / 64
SEMANTICS = ("differentiable", "released")
READERS = ("hopfield", "attention")
NOT_DOUBLE = (torch.float32, torch.bfloat16, torch.float16)
DOUBLE = (torch.float64,)
SELECTION_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


class GlobalWorkspace(nn.Module):
    """Shared workspace without feed-forward: squash, write, memory update, read.

    1. All tokens of the batch form one pool, ``X (T, E)``.
    2. Write: each (head, slot) row keeps its ``k`` largest logits ``(gamma W_Q) . (X W_K) / sqrt(D)`` over the pool,
       and the softmax runs over those alone. ``gamma_hat = LN(dropout(concat_heads(sum gate * X W_V) W_O) + gamma)``.
    3. Memory: ``gamma' = normalize_rows((1 - alpha) gamma + alpha gamma_hat)``.
    4. Read: every token is rebuilt from the patterns ``P = gamma' W_LT + b`` by Hopfield retrieval.

    In training, each forward pass changes the memory, in place and outside autograd. A batch that would make it
    non-finite leaves it as it was and is counted in ``memory.skipped_updates``. The balance loss of the last forward
    pass is kept for :func:`ait.balance_loss`. The memory and the algebra on it run in float32 (float64 in a float64
    module), with autocast off.

    Under eager activation checkpointing a recompute reads what its own forward pass read, and writes nothing. For that
    the layer keeps what the last 64 forward passes read that were checkpointed or ran without autograd
    (``ait.nn.recompute.RECORDS_KEPT``). A backward pass through a checkpointed pass that lies further back raises a
    RuntimeError; a recompute that does not repeat its tokens (checkpointing with ``preserve_rng_state=False`` and a
    dropout before the layer) gets gradients that are NaN.

    Args:
        dim: token width ``E``.
        num_slots: ``M``.
        slot_dim: slot width ``D``.
        num_heads: ``S``, heads of the write (and of the ``"attention"`` reader).
        top_k: capacity ``k`` of a row, in tokens; not together with ``top_k_ratio``.
        top_k_ratio: capacity as a share of the batch's ``T`` tokens, masked ones included:
            ``k = max(1, ceil(ratio * T))``; 1/64 by default, 1.0 = no bottleneck (dense attention).
        memory: ``"ewma"`` (written by every training batch), ``"learned"`` (a parameter) or ``"fixed"`` (random);
            the last two have no writer and no balance loss.
        semantics: ``"differentiable"`` (the write learns through ``alpha * gamma_hat``; in ``eval()`` the memory
            stands still) or ``"released"`` (the authors' code: no gradient through the memory, which moves in
            ``eval()``, too; writer parameters that can get no gradient have ``requires_grad=False``).
        reader: ``"hopfield"``, or ``"attention"``: multi-head attention from tokens to slots, an ablation.
        alpha: weight of the new batch in the moving average.
        beta: inverse temperature of the Hopfield retrieval.
        steps: the most Hopfield retrieval steps, up to 10,000.
        tol: in Hopfield retrieval, a token stops after the first step that moves it by less in L2 norm; 0 never stops.
        balance_weight: weight ``sigma`` of the balance loss.
        write_dropout: probability with which an entry of the heads' answer is dropped in training.
        selection_dtype: dtype of the selection's operands, float32 by default; see
            :func:`ait.ops.bottleneck_select`.
        generator: source of the initial memory; the global one by default.
        device: device of parameters and buffers.
        dtype: dtype of the parameters, float32, float64, bfloat16 or float16; the memory has float32 at least.

    Raises:
        ValueError: an argument is not as above.

    Source: Sun et al., Associative Transformer, arXiv 2309.12862.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int = 32,
        slot_dim: int = 32,
        num_heads: int = 8,
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
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GlobalWorkspace"
        check_dtype(name, dtype)
        dim = check_positive_int(name, "dim", dim)
        num_slots = check_positive_int(name, "num_slots", num_slots)
        slot_dim = check_positive_int(name, "slot_dim", slot_dim)
        num_heads = check_positive_int(name, "num_heads", num_heads)
        if top_k is not None and top_k_ratio is not None:
            raise op_error(name, "top_k or top_k_ratio, not both", f"top_k={top_k}, top_k_ratio={top_k_ratio}")
        if top_k is not None:
            top_k = check_positive_int(name, "top_k", top_k)
        else:
            top_k_ratio = DEFAULT_TOP_K_RATIO if top_k_ratio is None else top_k_ratio
            top_k_ratio = check_number(name, "top_k_ratio", top_k_ratio, "(0, 1]")
        check_choice(name, "memory", memory, MEMORIES)
        check_choice(name, "reader", reader, READERS)
        steps = check_positive_int(name, "steps", steps)
        if steps > MAX_STEPS:
            raise op_error(name, f"steps of at most {MAX_STEPS}", steps)
        if selection_dtype not in SELECTION_DTYPES:
            raise op_error(name, "selection_dtype None, float32, bfloat16 or float16", repr(selection_dtype))
        if generator is not None and not isinstance(generator, torch.Generator):
            raise op_error(name, "generator to be a torch.Generator or None", repr(generator))
        self.dim = dim
        self.top_k = top_k
        self.top_k_ratio = top_k_ratio
        self.semantics = check_choice(name, "semantics", semantics, SEMANTICS)
        self.alpha = check_number(name, "alpha", alpha, "(0, 1]")
        self.balance_weight = check_number(name, "balance_weight", balance_weight, "[0, inf)")
        beta = check_number(name, "beta", beta, "(0, inf)")
        memory_dtype = torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32
        if not is_positive_in(memory_dtype, beta):
            raise op_error(name, f"beta to be a finite number in (0, inf) as {memory_dtype}", beta)
        tol = check_number(name, "tol", tol, "[0, inf)")
        write_dropout = check_number(name, "write_dropout", write_dropout, "[0, 1)")
        self.frozen = False
        # Whether the mask comes from outside of what is checkpointed. A recompute then takes its forward pass's own.
        self.mask_is_ambient = False
        self._requires_grad_before: dict[str, bool] = {}
        self._kept_loss = KeptLoss()
        self._records = ForwardRecords()

        placement: dict[str, Any] = dict(device=device, dtype=dtype)
        differentiable = semantics == "differentiable"
        self.memory = Memory(num_slots, slot_dim, memory, unit_rows=differentiable, generator=generator, **placement)
        self.writer: BottleneckWriter | None = None
        if memory == "ewma":
            self.writer = BottleneckWriter(
                dim,
                num_slots=num_slots,
                slot_dim=slot_dim,
                num_heads=num_heads,
                dropout=write_dropout,
                selection_dtype=selection_dtype,
                **placement,
            )
            if not differentiable:
                self.writer.requires_grad_(False)
        self.reader: HopfieldReader | AttentionReader
        if reader == "hopfield":
            self.reader = HopfieldReader(dim, slot_dim, beta=beta, steps=steps, tol=tol, **placement)
        else:
            self.reader = AttentionReader(dim, slot_dim, num_heads=num_heads, **placement)
        for parameter in self.learning_parameters():
            parameter.requires_grad_(True)

    @overload
    def forward(
        self, f: Tensor, key_padding_mask: Tensor | None = None, *, return_aux: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, f: Tensor, key_padding_mask: Tensor | None = None, *, return_aux: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, f: Tensor, key_padding_mask: Tensor | None = None, *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Writes the batch into the memory (in training, not frozen) and retrieves every token from it.

        Args:
            f: ``(B, *, E)``, the tokens.
            key_padding_mask: ``(B, *)`` bool, True = ignore: such tokens never write and are left out of the balance
                loss. They are still retrieved, like any other token.
            return_aux: whether to return the balance loss, too.

        Returns:
            The retrieved tokens, ``(B, *, E)`` in the dtype of ``f``; with ``return_aux``, also the balance loss, a
            scalar with ``balance_weight`` inside. It is the same loss that :func:`ait.balance_loss` sums; detached
            where :func:`ait.inject_balance_loss` supplies its gradient.

        Raises:
            ValueError: shape, dtype or device of an argument is not as above.
        """
        gamma = self.memory.gamma
        if getattr(self, "_is_replica", False) and self.writes_now:
            raise replica_error("GlobalWorkspace")
        check_input("GlobalWorkspace", f, self.dim, gamma.device, DOUBLE if gamma.dtype in DOUBLE else NOT_DOUBLE)
        if key_padding_mask is not None:
            check_padding_mask("GlobalWorkspace", key_padding_mask, f)
        if self._kept_loss.injection is not None and self.training:
            self._kept_loss.injection.check_precision(f)
        without_autocast = torch.autocast(f.device.type, enabled=False) if _autocasts(f) else contextlib.nullcontext()
        with without_autocast:
            tokens = f.reshape(-1, self.dim)
            mask = None if key_padding_mask is None else key_padding_mask.reshape(-1)
            retrieved, loss = self._write_and_read(tokens, mask)
        retrieved = retrieved.reshape(f.shape)
        return (retrieved, loss) if return_aux else retrieved

    def capacity(self, num_tokens: int) -> int:
        """``k``, the tokens that a row lets in, for a batch of ``num_tokens``; no bottleneck where it is all."""
        if self.top_k_ratio is None:
            assert self.top_k is not None
            return self.top_k
        if self.top_k_ratio == 1.0:
            return num_tokens
        # The guard keeps, say, 1/64 of 6,400 tokens at 100 whatever the ratio's last bit.
        return max(1, math.ceil((self.top_k_ratio - 1e-9) * num_tokens))

    def freeze(self, frozen: bool = True) -> None:
        """Stops the write (also in training), and the writer's learning; ``frozen=False`` undoes it.

        A learned memory stops learning instead; a fixed one has nothing to stop.
        """
        learners = self.memory_learners()
        if frozen and not self.frozen:
            self._requires_grad_before = {name: p.requires_grad for name, p in learners.named_parameters()}
            learners.requires_grad_(False)
        elif self.frozen and not frozen:
            for name, parameter in learners.named_parameters():
                parameter.requires_grad_(self._requires_grad_before[name])
            self._requires_grad_before = {}
        self.frozen = frozen

    def memory_learners(self) -> nn.Module:
        """What learns the memory, or to write it: the part whose learning :meth:`freeze` stops."""
        return self.memory if self.writer is None else self.writer

    def learning_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters to which a gradient can come: in ``"released"`` semantics not all of the writer's."""
        yield from self.memory.parameters()
        if self.writer is not None and self.semantics == "released":
            if self.balance_weight > 0:
                yield from self.writer.query.parameters()
                yield from self.writer.key.parameters()
        elif self.writer is not None:
            yield from self.writer.parameters()
        yield from self.reader.parameters()

    def _write_and_read(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Retrieved tokens ``(T, E)`` and the balance loss."""
        this = self._begin(tokens, mask)
        if this.is_recompute and self.mask_is_ambient:
            mask = this.mask
        memory = self.memory.as_read(this.stored)
        if this.writes:
            mixed, loss = self._mix(memory, tokens, mask, this.training)
            updated, finite = self.memory.normalize(mixed)
            accepted = finite if mask is None else finite & ~mask.all()
            memory = torch.where(accepted, updated, memory)
            if not this.is_recompute:
                self.memory.store(memory, accepted, finite)
        else:
            loss = memory.new_zeros(())
        if this.injection is not None:
            memory, loss = inject_gradient(memory, loss, this.injection), loss.detach()
        retrieved = self.reader(tokens, memory)
        if this.is_recompute:
            return pass_balance_gradient(retrieved, loss, this), loss
        self._keep(loss, this)
        return retrieved, loss

    def _begin(self, tokens: Tensor, mask: Tensor | None) -> ForwardPass:
        """What this pass reads: the memory as it is now, or, in a recompute, what its forward pass read."""
        recorded = self.writer is not None and not torch.compiler.is_compiling()
        given_mask = None if self.mask_is_ambient else mask
        repeated = self._records.find(tokens, given_mask) if recorded else None
        if repeated is not None:
            return repeated
        this = ForwardPass(
            stored=self.memory.snapshot(),
            writes=self.writes_now and tokens.shape[0] > 0,
            training=self.training,
            grad_enabled=torch.is_grad_enabled(),
            balance_grad=BalanceGradient(),
            mask=mask if self.mask_is_ambient else None,
            injection=self._kept_loss.injection,
        )
        if recorded:
            self._records.add(tokens, given_mask, this)
        return this

    def _keep(self, loss: Tensor, this: ForwardPass) -> None:
        """Keeps the balance loss for :func:`ait.balance_loss`."""
        if torch.compiler.is_exporting():
            return
        balances = this.writes and this.training and self.balance_weight > 0 and this.injection is None
        without_grad = not (torch.is_grad_enabled() or torch.is_inference_mode_enabled())
        if balances and without_grad and not torch.compiler.is_compiling():
            # Perhaps the first pass of reentrant checkpointing, whose recompute will ask for this gradient.
            loss = loss.detach().clone().requires_grad_()
            loss.register_hook(this.balance_grad.receive)
        self._kept_loss.keep(loss)

    @property
    def writes_now(self) -> bool:
        """Whether a forward pass would write its tokens into the memory."""
        return self.writer is not None and not self.frozen and (self.training or self.semantics == "released")

    def _mix(self, memory: Tensor, tokens: Tensor, mask: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        """``(1 - alpha) gamma + alpha gamma_hat``, ``(M, D)``, and the balance loss."""
        assert self.writer is not None
        k = self.capacity(tokens.shape[0])
        detached = self.semantics == "released"
        with torch.no_grad() if detached else contextlib.nullcontext():
            candidate, gates, indices = self.writer(memory, tokens, mask, k, training)
            mixed = torch.lerp(memory, candidate, self.alpha)
        if not training or self.balance_weight == 0:
            return mixed, memory.new_zeros(())
        if detached and torch.is_grad_enabled():
            # The published code overwrites the memory before the backward pass, which then finds the mixture where
            # the forward pass had read the old memory: values of the one, gradient of the other.
            query = self.writer.ask(mixed)
            query = query + (self.writer.ask(memory) - query).detach()
            _, gates, indices = self.writer.attend(query, tokens, mask, k, indices)
        num_tokens, num_heads = tokens.shape[0], self.writer.num_heads
        return mixed, balance_of(gates, indices, mask, num_tokens, num_heads, self.balance_weight)

    def extra_repr(self) -> str:
        capacity = f"top_k={self.top_k}" if self.top_k_ratio is None else f"top_k_ratio={self.top_k_ratio:g}"
        parts = [f"{self.dim}", capacity, f"semantics={self.semantics!r}", f"alpha={self.alpha:g}"]
        if self.writer is not None:
            parts.append(f"balance_weight={self.balance_weight:g}")
        if self.frozen:
            parts.append("frozen")
        return ", ".join(parts)


class GlobalWorkspaceLayer(nn.Module):
    """Global Workspace Layer: feed-forward, then the shared workspace; it takes the place of a block's MLP.

    ``f = LN(fc2(GELU(fc1(x))))``, output ``workspace(f) + f``. The input is normalised by the block (pre-norm), and
    the residual to ``x`` is the block's. All arguments but the first two are those of :class:`GlobalWorkspace`.

    Args:
        dim: token width ``E``.
        hidden_dim: width between ``fc1`` and ``fc2``, ``4 * dim`` by default.

    Raises:
        ValueError: an argument is not as above.

    Source: Sun et al., Associative Transformer, arXiv 2309.12862.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        num_slots: int = 32,
        slot_dim: int = 32,
        num_heads: int = 8,
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
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GlobalWorkspaceLayer"
        check_dtype(name, dtype)
        dim = check_positive_int(name, "dim", dim)
        hidden_dim = check_positive_int(name, "hidden_dim", 4 * dim if hidden_dim is None else hidden_dim)
        self.dim = dim
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.workspace = GlobalWorkspace(
            dim,
            num_slots=num_slots,
            slot_dim=slot_dim,
            num_heads=num_heads,
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
            generator=generator,
            device=device,
            dtype=dtype,
        )

    @overload
    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, *, return_aux: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, *, return_aux: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Applies the layer; in training, the batch is written into the memory first.

        Args:
            x: ``(B, *, E)``, already normalised.
            key_padding_mask: ``(B, *)`` bool, True = ignore: such tokens never write and are left out of the balance
                loss. They get an output like any other token.
            return_aux: whether to return the balance loss, too.

        Returns:
            ``(B, *, E)``, without a residual to ``x``; with ``return_aux``, also the balance loss, a scalar with
            ``balance_weight`` inside. It is the same loss that :func:`ait.balance_loss` sums: add one of them. It is
            detached where :func:`ait.inject_balance_loss` supplies its gradient.

        Raises:
            ValueError: shape, dtype or device of an argument is not as above.
        """
        name = "GlobalWorkspaceLayer"
        weight = self.fc1.weight
        # Autocast brings float32 and less to one dtype, and leaves float64 alone.
        mixed = _autocasts(x) and weight.dtype not in DOUBLE
        check_input(name, x, self.dim, weight.device, NOT_DOUBLE if mixed else (weight.dtype,))
        if key_padding_mask is not None:
            check_padding_mask(name, key_padding_mask, x)
        f = self.feed_forward(x)
        retrieved, loss = self.workspace(f, key_padding_mask, return_aux=True)
        y = retrieved + f
        return (y, loss) if return_aux else y

    def feed_forward(self, x: Tensor) -> Tensor:
        """``f = LN(fc2(GELU(fc1(x))))``: what enters the workspace, ``(B, *, E)`` to the same shape."""
        f: Tensor = self.norm(self.fc2(F.gelu(self.fc1(x))))
        return f


def _autocasts(x: Any) -> bool:
    """Whether autocast is on for the device of ``x``; there are devices (meta) that have none."""
    if not isinstance(x, Tensor):
        return False
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
