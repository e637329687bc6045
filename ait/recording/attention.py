"""Weights of self-attention, wherever in a model it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ait.recording.statistics import attention_weights


class SelfAttentionCapture(TorchFunctionMode):
    """Hands on the attention weights ``(B, N, N)``, means over heads, of each self-attention of ``model``.

    Sees :func:`torch.nn.functional.scaled_dot_product_attention`, which the attention of ait, timm and Transformers
    calls, whatever it did to queries and keys before, and :class:`torch.nn.MultiheadAttention` (torchvision), whose
    kernels PyTorch chooses by what surrounds them and which is therefore left alone: its weights are computed apart;
    no other attention of a model that has one is seen.

    The mode is entered for a forward pass and left after it, so that recordings may end in any order.
    """

    def __init__(self, model: nn.Module, receive: Callable[[Callable[[], Tensor]], None]) -> None:
        super().__init__()
        self.receive = receive
        self.multihead = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
        self._handles = contextlib.ExitStack()
        self._forward = contextlib.ExitStack()

    def start(self) -> None:
        for module in self.multihead:
            handle = module.register_forward_pre_hook(self._before_multihead, with_kwargs=True)
            self._handles.callback(handle.remove)

    def stop(self) -> None:
        self.leave_forward()
        self._handles.close()

    def enter_forward(self) -> None:
        if not self.multihead:
            self._forward.enter_context(self)

    def leave_forward(self) -> None:
        self._forward.close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._attended(*args, **kwargs)
        return func(*args, **kwargs)

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
            self.receive(lambda: attention_weights(query, key, attn_mask, is_causal, scale))

    def _before_multihead(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        given = dict(
            zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), args, strict=False)
        )
        given.update(kwargs)
        query, key = given["query"], given["key"]
        if query is key and query.dim() == 3:
            self.receive(lambda: _multihead_weights(module, query, given))


def _multihead_weights(module: nn.MultiheadAttention, x: Tensor, given: dict[str, Any]) -> Tensor:
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise ValueError(
            "record: expected torch.nn.MultiheadAttention with queries, keys and values of one width and without "
            "bias_kv or zero attention, got another; record with attention=False"
        )
    if not module.batch_first:
        x = x.transpose(0, 1)
    width = module.embed_dim
    bias = None if module.in_proj_bias is None else module.in_proj_bias[: 2 * width]
    query, key = F.linear(x, module.in_proj_weight[: 2 * width], bias).chunk(2, dim=-1)
    heads = [each.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for each in (query, key)]
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    added = x.new_zeros(1)
    for closed in (
        None if mask is None else mask.unflatten(0, (-1, module.num_heads)) if mask.dim() == 3 else mask,
        None if padding is None else padding[:, None, None, :],
    ):
        if closed is not None:
            # Here True means: takes no part.
            added = added + (closed if closed.is_floating_point() else added.masked_fill(closed, -torch.inf))
    return attention_weights(heads[0], heads[1], added if added.dim() > 1 else None, False, None)
