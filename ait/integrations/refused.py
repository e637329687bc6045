"""Hosts that nothing may be put into: the change would be lost, ignored, or break what the host is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

PACKED_WEIGHTS = ("qweight", "qzeros", "weight_packed")


def refusal(model: Any) -> tuple[str, str] | None:
    """What was expected instead of ``model``, and what came; None if it can be changed."""
    if not isinstance(model, nn.Module):
        return "a torch.nn.Module", type(model).__name__
    for name, module in model.named_modules():
        reason = _refuse_wrapper(module) or _refuse_quantized(module)
        if reason is not None:
            expected, got = reason
            return expected, f"{got} ({name!r})" if name else got
    config = getattr(model, "config", None)
    if getattr(model, "is_quantized", False) is True or getattr(config, "quantization_config", None) is not None:
        return "a host that is not quantised", f"{type(model).__name__} with a quantization_config"
    return None


def _refuse_wrapper(module: nn.Module) -> tuple[str, str] | None:
    got = type(module).__name__
    bases = {base.__name__ for base in type(module).__mro__}
    if isinstance(module, nn.DataParallel):
        return (
            "a model outside of torch.nn.DataParallel, whose replicas would each write a memory of their own and lose "
            "it; insert first, then wrap in torch.nn.parallel.DistributedDataParallel",
            got,
        )
    if bases & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}:
        return "a model that is not wrapped yet, since wrappers do not see later parameters; insert first", got
    if isinstance(module, torch.jit.ScriptModule):
        return "an eager model, not a scripted, traced or frozen one; insert before torch.jit", got
    if isinstance(module, torch.fx.GraphModule):
        return "an eager model, not a traced or exported graph; insert before tracing", got
    if "OptimizedModule" in bases or getattr(module, "_compiled_call_impl", None) is not None:
        return "a model that is not compiled yet, since compiled code does not see later hooks; insert first", got
    return None


def _refuse_quantized(module: nn.Module) -> tuple[str, str] | None:
    got = type(module).__name__
    expected = "a host with floating-point weights that is not quantised"
    if "quantized" in type(module).__module__.split("."):
        return expected, got
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if is_lazy(tensor):
            return "a host whose lazy modules have run once", f"{got} with an uninitialised {name}"
        packed = tensor.is_quantized or type(tensor).__module__.startswith("torchao") or name in PACKED_WEIGHTS
        is_weight = isinstance(tensor, nn.Parameter)
        is_narrow = tensor.dtype.itemsize < 2 or not (tensor.is_floating_point() or tensor.is_complex())
        if packed or (is_weight and is_narrow):
            return expected, f"{got} with {name} of dtype {tensor.dtype}"
    return None
