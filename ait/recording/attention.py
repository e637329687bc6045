"""Weights of self-attention, wherever in a model it is computed."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from ait.ops.reference import accumulate_dtype
from ait.recording.statistics import attention_weights

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)

# Takes a tensor that the attention is computed from, and what computes its weights.
Receive = Callable[[Tensor, Callable[[], Tensor]], None]


class SelfAttentionCapture(TorchFunctionMode):
    """Hands on the attention weights ``(B, N, N)``, means over heads, of each self-attention of ``model``, as they run.

    Four kinds are seen, side by side in one model:

    - :func:`torch.nn.functional.scaled_dot_product_attention`, which the attention of ait, timm and Transformers
      calls, whatever it did to queries and keys before;
    - a softmax over the last axis of ``(B, heads, N, N)``, as attention is written out (timm without fused attention,
      Transformers with ``attn_implementation="eager"``, their older releases);
    - :class:`torch.nn.MultiheadAttention` (torchvision);
    - :class:`torch.nn.TransformerEncoderLayer`.

    PyTorch chooses the kernels of the modules by what surrounds them, modes and hooks included. So this mode is off
    while they run, the layer is watched without hooks, and the weights of both are computed apart.

    The mode is entered for a forward pass and left after it, so that recordings may end in any order.
    """

    def __init__(self, model: nn.Module, receive: Receive) -> None:
        super().__init__()
        self.receive = receive
        modules = list(model.modules())
        self._layers = [module for module in modules if _is_fused_layer(module)]
        fused = {id(layer.self_attn) for layer in self._layers}
        self._multihead = [m for m in modules if isinstance(m, nn.MultiheadAttention) and id(m) not in fused]
        self._encoders = [module for module in modules if isinstance(module, nn.TransformerEncoder)]
        self._handles: list[RemovableHandle] = []
        self._within = False  # a forward pass
        self._paused: list[list[TorchFunctionMode] | None] = []  # what stood above this mode when it was taken off
        self._num_tokens: int | None = None  # of the padded input of a TransformerEncoder

    def start(self, hook: Callable[[Callable[..., None]], Any]) -> None:
        """Begins to watch; ``hook`` makes a hook of the model's of a function."""
        for module in self._multihead:
            before, after = hook(self._before_multihead), hook(self._after)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        for encoder in self._encoders:
            before, after = hook(self._before_encoder), hook(self._after)
            self._handles.append(encoder.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(encoder.register_forward_hook(after, always_call=True))
        for layer in self._layers:
            _watch(layer, self)

    def stop(self) -> None:
        self.leave_forward()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self._layers:
            _unwatch(layer, self)

    def enter_forward(self) -> None:
        self._within, self._paused = True, []
        _push_mode(self)

    def leave_forward(self) -> None:
        self._within = False
        self._take_off()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._attended(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAX:
            self._normalised(result, kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None)
        return result

    def pause(self) -> None:
        """Takes the mode off until :meth:`resume`."""
        self._paused.append(self._take_off())

    def resume(self) -> None:
        above = self._paused.pop() if self._paused else None
        if above is None or not self._within:
            return
        held = []
        while (stack := _get_current_function_mode_stack()) and any(stack[-1] is mode for mode in above):
            held.append(_pop_mode())
        for mode in (self, *reversed(held)):
            _push_mode(mode)

    def _take_off(self) -> list[TorchFunctionMode] | None:
        """Takes this mode out of PyTorch's stack, and gives those that stood above it; None where it was not there."""
        stack = _get_current_function_mode_stack()
        if not any(mode is self for mode in stack):
            return None
        above = []
        while (mode := _pop_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)
        return above

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.dim() == 4 and query.shape[-2] == key.shape[-2]:
            self.receive(query, lambda: attention_weights(query, key, attn_mask, is_causal, scale))

    def _normalised(self, weights: Tensor, dim: int | None) -> None:
        if weights.dim() == 4 and dim in (-1, 3) and weights.shape[-2] == weights.shape[-1]:
            self.receive(weights, lambda: weights.to(accumulate_dtype(weights.dtype)).mean(1))

    def _before_multihead(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, padding, mask = given["query"], given.get("key_padding_mask"), given.get("attn_mask")
        if query is given["key"] and query.dim() == 3:
            self.receive(query, lambda: _multihead_weights(module, query, padding, mask))
        self.pause()

    def _before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """It packs padded sequences into nested tensors, if no mode is on."""
        src = args[0] if args else kwargs["src"]
        self._num_tokens = src.shape[1] if src.dim() == 3 and not src.is_nested else None
        if getattr(module, "use_nested_tensor", False):
            self.pause()
        else:
            self._paused.append(None)

    def _after(self, *_: Any) -> None:
        self.resume()

    def before_layer(
        self,
        layer: nn.TransformerEncoderLayer,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> None:
        """A TransformerEncoderLayer is called with these arguments."""

        def compute() -> Tensor:
            x, padding = src, src_key_padding_mask
            if x.is_nested:
                lengths = torch.tensor([len(each) for each in x.unbind()], device=x.device)
                x = x.to_padded_tensor(0.0, (len(lengths), self._num_tokens or int(lengths.max()), x.size(-1)))
                padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            if layer.norm_first:
                weight = getattr(layer.norm1, "weight", None)
                x = layer.norm1.forward(x if weight is None else x.to(weight.dtype))
            return _multihead_weights(layer.self_attn, x, padding, src_mask)

        if src.dim() == 3:
            self.receive(src, compute)


class _WatchedForward:
    """Stands in for the ``forward`` of a TransformerEncoderLayer, which tells its recordings before it runs."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        self.layer = layer
        self.own = layer.__dict__.get("forward")
        self.captures: list[SelfAttentionCapture] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        captures = list(self.captures)
        for capture in captures:
            capture.before_layer(self.layer, *args, **kwargs)
            capture.pause()
        try:
            return self._forward()(*args, **kwargs)
        finally:
            for capture in captures:
                capture.resume()

    def _forward(self) -> Callable[..., Any]:
        return _class_forward(self.layer) if self.own is None else self.own

    def __reduce__(self) -> Any:
        """Copies and pickles of the layer do not record."""
        return _class_forward, (self.layer,)


def _class_forward(layer: nn.Module) -> Callable[..., Any]:
    return MethodType(type(layer).forward, layer)


def _is_fused_layer(module: nn.Module) -> bool:
    """Whether a module is a TransformerEncoderLayer that runs PyTorch's own code, in parts or in one kernel."""
    return (
        isinstance(module, nn.TransformerEncoderLayer)
        and type(module).forward is nn.TransformerEncoderLayer.forward
        and isinstance(module.self_attn, nn.MultiheadAttention)
    )


def _watch(layer: Any, capture: SelfAttentionCapture) -> None:
    if not isinstance(layer.__dict__.get("forward"), _WatchedForward):
        layer.forward = _WatchedForward(layer)
    layer.forward.captures.append(capture)


def _unwatch(layer: Any, capture: SelfAttentionCapture) -> None:
    watched = layer.__dict__.get("forward")
    if not isinstance(watched, _WatchedForward) or capture not in watched.captures:
        return
    watched.captures.remove(capture)
    if not watched.captures:
        del layer.forward
        if watched.own is not None:
            layer.forward = watched.own


def _multihead_weights(module: nn.MultiheadAttention, x: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor:
    """Weights of ``module(x, x, x, padding, attn_mask=mask)``; in the masks True, or -inf, means: takes no part."""
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise ValueError(
            "record: expected torch.nn.MultiheadAttention with queries, keys and values of one width and without "
            "bias_kv or zero attention, got another; record with attention=False"
        )
    if not module.batch_first:
        x = x.transpose(0, 1)
    dtype, width = accumulate_dtype(x.dtype), module.embed_dim
    bias = None if module.in_proj_bias is None else module.in_proj_bias[: 2 * width].to(dtype)
    query, key = F.linear(x.to(dtype), module.in_proj_weight[: 2 * width].to(dtype), bias).chunk(2, dim=-1)
    heads = [each.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for each in (query, key)]
    added = x.new_zeros(1, dtype=dtype)
    for closed in (
        None if mask is None else mask.unflatten(0, (-1, module.num_heads)) if mask.dim() == 3 else mask,
        None if padding is None else padding[:, None, None, :],
    ):
        if closed is not None:
            added = added + (closed if closed.is_floating_point() else added.masked_fill(closed, -torch.inf))
    return attention_weights(heads[0], heads[1], added if added.dim() > 1 else None, False, None)
