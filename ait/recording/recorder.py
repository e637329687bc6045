"""Records what the workspaces of a model do, through module hooks that exist only while it lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ait.nn._validate import check_choice
from ait.ops._checks import check_positive_int, op_error
from ait.recording.attention import SelfAttentionCapture
from ait.recording.capture import Capture, Options, in_backward, observing
from ait.recording.eager import EAGER, INSIDE_COMPILED
from ait.recording.layout import choose_workspaces, find_workspaces, unwrap
from ait.recording.trace import AttentionRecord, LayerRecord, Pass, Trace

WRITES = ("always", "as_run")


def record(
    model: nn.Module,
    *,
    layers: Sequence[str | int] | str | int | None = None,
    write: Literal["always", "as_run"] = "always",
    attention: bool = False,
    energy_steps: int | None = None,
    keep_tokens: bool = False,
    keep_inputs: bool = False,
    max_passes: int | None = None,
    device: torch.device | str | None = None,
    detach: bool = True,
) -> contextlib.AbstractContextManager[Trace]:
    """Records every forward pass of ``model`` inside the block.

    ::

        with ait.record(model) as trace:
            model(images)
        trace.layer(0).write.indices  # (S, M, k): the tokens of the batch that each (head, slot) row took

    Outputs, gradients, random numbers and memories stay what they are without it, bit for bit. Outside the block
    nothing of it is left in the model. Recomputation under activation checkpointing is not recorded again. Recordings
    may be nested, and stay readable after an exception.

    Parts that ``torch.compile`` compiled run eagerly inside the block, where their results differ from the compiled
    ones by rounding; they are not compiled anew. A recording cannot begin inside a compiled function.

    Args:
        model: any module with workspaces in it, also inside ``DistributedDataParallel`` or ``torch.compile``.
        layers: what to record: indices in the order of the model's modules, names of workspaces, or names of modules
            around them (``"blocks.0"``); all by default.
        write: ``"always"`` also computes the write of layers that do not write (in eval, with a frozen memory), without
            keeping it; ``"as_run"`` only looks on.
        attention: also keep the weights of self-attention, for :func:`ait.viz.attention_rollout`, in the order in which
            it runs: of every call of :func:`torch.nn.functional.scaled_dot_product_attention`,
            :class:`torch.nn.MultiheadAttention` and :class:`torch.nn.TransformerEncoderLayer`, and of every softmax
            over the last axis of ``(B, heads, N, N)``.
            All layers are recorded then.
        energy_steps: also follow the energy of each token over so many retrieval steps, be they more or fewer than the
            layer's own.
        keep_tokens: also keep the tokens that came and the tokens that were retrieved.
        keep_inputs: also keep the model's first tensor argument.
        max_passes: keep the last so many passes; all by default.
        device: where to move what is recorded, such as ``"cpu"``; it stays where it is by default.
        detach: False keeps records in the graph of autograd, to learn from them. Under activation checkpointing that
            is an error of PyTorch's, since the recomputation is not recorded.

    Returns:
        A context manager that gives the :class:`~ait.recording.Trace`, which fills as the model runs.

    Raises:
        ValueError: ``model`` has no workspace, a layer does not exist, or an option is not as above.
        RuntimeError: called inside a function that is being compiled.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(INSIDE_COMPILED)
    recorder = Recorder(
        model,
        layers=layers,
        write=write,
        attention=attention,
        energy_steps=energy_steps,
        keep_tokens=keep_tokens,
        keep_inputs=keep_inputs,
        max_passes=max_passes,
        device=device,
        detach=detach,
    )
    return recorder


class Recorder(contextlib.AbstractContextManager[Trace]):
    """:func:`record` in two calls, for loggers: ``start()`` and ``stop()``, any number of times.

    The arguments are those of :func:`record`; what is recorded fills ``trace``, which a ``with`` block is given, too.

    Raises:
        ValueError: as :func:`record`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str | int] | str | int | None = None,
        write: Literal["always", "as_run"] = "always",
        attention: bool = False,
        energy_steps: int | None = None,
        keep_tokens: bool = False,
        keep_inputs: bool = False,
        max_passes: int | None = None,
        device: torch.device | str | None = None,
        detach: bool = True,
    ) -> None:
        name = "record"
        if not isinstance(model, nn.Module):
            raise op_error(name, "a torch.nn.Module", type(model).__name__)
        self.model = unwrap(model)
        workspaces = find_workspaces(name, self.model)
        self.workspaces = choose_workspaces(name, workspaces, layers)
        if attention and len(self.workspaces) < len(workspaces):
            raise op_error(name, "layers=None with attention=True (a rollout goes through all of them)", repr(layers))
        if energy_steps is not None:
            energy_steps = check_positive_int(name, "energy_steps", energy_steps)
        self.max_passes = None if max_passes is None else check_positive_int(name, "max_passes", max_passes)
        self.attention = attention
        self.keep_inputs = keep_inputs
        self.options = Options(
            always_write=check_choice(name, "write", write, WRITES) == "always",
            energy_steps=energy_steps,
            keep_tokens=keep_tokens,
            device=None if device is None else _as_device(name, device),
            detach=detach,
        )
        self.trace = Trace(type(self.model).__name__)
        self._handles: list[RemovableHandle] = []
        self._attention: SelfAttentionCapture | None = None
        self._depth = 0  # of the model's own forward calls
        self._inside = 0  # of workspaces, whose attention readers are no self-attention
        self._loose: Pass | None = None  # of parts of the model that are called by themselves

    def start(self) -> None:
        """Begins to record; what an earlier start recorded stays in ``trace``.

        Raises:
            RuntimeError: it is recording already, or this is inside a function that is being compiled.
        """
        if self._handles:
            raise RuntimeError("record: expected a recorder that is not recording, got one that is; stop() it first")
        self._depth = self._inside = 0
        self._loose = None
        EAGER.enter()
        try:
            self._hook_model()
            for name, workspace in self.workspaces.items():
                self._hook_workspace(Capture(name, workspace, self.model, self.options))
            # Last, since the model may itself be a workspace, whose record comes first.
            self._hook_model_end()
            if self.attention:
                self._attention = SelfAttentionCapture(self.model, self._add_attention)
                self._attention.start(_Hook)
        except BaseException:
            self._end()
            raise

    def stop(self) -> None:
        """Ends the recording, and takes every hook out of the model."""
        if self._handles:
            self._end()

    def __enter__(self) -> Trace:
        self.start()
        return self.trace

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._attention is not None:
            self._attention.stop()
            self._attention = None
        EAGER.leave()

    def _hook_model(self) -> None:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if in_backward():
                return
            if self._depth == 0:
                self._begin_pass(Pass(complete=False), args, kwargs)
                if self._attention is not None:
                    self._attention.enter_forward()
            self._depth += 1

        self._add(self.model.register_forward_pre_hook, begin, with_kwargs=True)

    def _hook_model_end(self) -> None:
        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if in_backward() or self._depth == 0:
                return
            self._depth -= 1
            if self._depth == 0:
                if self._attention is not None:
                    self._attention.leave_forward()
                # An exception brings us here, too, without an output.
                self.trace.passes[-1].complete = output is not None

        self._add(self.model.register_forward_hook, end, always_call=True)

    def _hook_workspace(self, capture: Capture) -> None:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not in_backward():
                self._inside += 1
                capture.begin(*args, **kwargs)

        def wrote(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not in_backward():
                capture.wrote(args, output)

        def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not in_backward():
                capture.read(args, output)

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if in_backward():
                return
            self._inside -= 1
            layer = capture.end()
            if layer is not None:
                self._add_layer(layer)

        workspace = capture.workspace
        self._add(workspace.register_forward_pre_hook, begin, with_kwargs=True)
        if workspace.writer is not None:
            self._add(workspace.writer.register_forward_hook, wrote)
        self._add(workspace.reader.register_forward_hook, read)
        self._add(workspace.register_forward_hook, end, always_call=True)

    def _begin_pass(self, new: Pass, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        if self.keep_inputs:
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            with observing(self.options.detach):
                new.inputs = self.options.keep(tensors[0]) if tensors else None
        self.trace.passes.append(new)
        if self.max_passes is not None:
            del self.trace.passes[: -self.max_passes]

    def _add_layer(self, layer: LayerRecord) -> None:
        passes = self.trace.passes
        if self._depth == 0 and (not passes or passes[-1] is not self._loose or layer.name in passes[-1].layers):
            # A part of the model was called, such as forward_features: a pass ends where its layers come again.
            self._loose = Pass()
            self._begin_pass(self._loose)
        layers, name, calls = passes[-1].layers, layer.name, 0
        while layer.name in layers:
            calls += 1
            layer.name = f"{name}#{calls}"
        layers[layer.name] = layer

    def _add_attention(self, tensor: Tensor, compute: Callable[[], Tensor]) -> None:
        if self._depth == 0 or self._inside or in_backward():
            return
        with observing(self.options.detach, tensor.device.type):
            weights = self.options.keep(compute())
        self.trace.passes[-1].attention.append(AttentionRecord(weights, before=len(self.trace.passes[-1].layers)))

    def _add(self, register: Callable[..., RemovableHandle], hook: Callable[..., None], **options: bool) -> None:
        self._handles.append(register(_Hook(hook), **options))


def _as_device(name: str, device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise op_error(name, "device to be one of torch's, such as 'cpu'", repr(device)) from error


class _Hook:
    """A hook that belongs to a run and not to the model: copies and pickles of it do nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[Callable[..., None]]]:
        return _Hook, (_ignore,)


def _ignore(*args: Any) -> None:
    """The hook of a copy."""
