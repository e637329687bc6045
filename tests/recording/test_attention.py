"""Self-attention of every kind, side by side in one model: weights, order, and outputs that stay as they are."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack

import ait
from tests.recording.models import hook_count
from tests.tolerances import assert_close

WIDTH, HEADS, IMAGES, TOKENS = 16, 2, 3, 5


@pytest.fixture(autouse=True)
def stack_of_modes_stays_as_it_was() -> Iterator[None]:
    before = _len_torch_function_stack()
    yield
    assert _len_torch_function_stack() == before


def workspace() -> ait.GlobalWorkspace:
    return ait.GlobalWorkspace(WIDTH, num_slots=4, slot_dim=6, num_heads=2)


class Own(nn.Module):
    """Attention that calls scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)


class Multihead(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=False)[0]
        return y if self.attention.batch_first else y.transpose(0, 1)


def encoder_layer(norm_first: bool) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=norm_first)


def weights_of(module: nn.Module, x: Tensor) -> Tensor:
    """The weights of a module's attention, from PyTorch's own answer or the equation."""
    if isinstance(module, Own):
        query, key, _ = module.heads(x)
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1).mean(1)
    if isinstance(module, nn.TransformerEncoderLayer):
        y = module.norm1(x) if module.norm_first else x
        return module.self_attn(y, y, y)[1]
    assert isinstance(module, Multihead)
    y = x if module.attention.batch_first else x.transpose(0, 1)
    return module.attention(y, y, y)[1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_all_kinds_in_one_model_are_recorded_in_the_order_they_run_and_outputs_stay(training: bool) -> None:
    torch.manual_seed(1)
    parts = [
        Multihead(batch_first=True),
        Own(),
        workspace(),
        encoder_layer(norm_first=False),
        Multihead(batch_first=False),
        workspace(),
        encoder_layer(norm_first=True),
        Own(),
    ]
    model = nn.Sequential(*parts).train(training)
    x = torch.randn(IMAGES, TOKENS, WIDTH)
    copied = copy.deepcopy(model)
    with torch.set_grad_enabled(training):
        torch.manual_seed(2)
        expected = copied(x)
        torch.manual_seed(2)
        with ait.record(model, attention=True) as trace:
            actual = model(x)
    assert torch.equal(actual, expected)
    assert hook_count(model) == 0 and not any("forward" in vars(module) for module in model.modules())
    attention = trace[0].attention
    assert [each.before for each in attention] == [0, 0, 1, 1, 2, 2]
    if training:  # dropout stands between the parts, and their inputs cannot be had again
        return
    inputs = [x]
    with torch.no_grad():
        for part in copied:
            inputs.append(part(inputs[-1]))
        attended = [(part, y) for part, y in zip(copied, inputs, strict=False) if not hasattr(part, "memory")]
        for number, (recorded, (part, y)) in enumerate(zip(attention, attended, strict=True)):
            assert_close(recorded.weights, weights_of(part, y), f"weights {number}")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
def test_encoders_of_torch_keep_their_fused_kernels_and_nested_tensors(
    norm_first: bool, padded: bool, grad: bool
) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(encoder_layer(norm_first), 2, enable_nested_tensor=not norm_first)
            self.workspace = workspace()

        def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
            return self.workspace(self.encoder(x, src_key_padding_mask=padding), padding)

    torch.manual_seed(1)
    model = Encoder().eval()
    x, padding = torch.randn(IMAGES, TOKENS, WIDTH), None
    if padded:
        padding = torch.zeros(IMAGES, TOKENS, dtype=torch.bool)
        padding[0, 3:] = padding[:, 4:] = True  # so that the longest image is shorter than the batch, too
    with torch.set_grad_enabled(grad), calls_of_the_fused_kernel() as calls:
        expected = model(x, padding)
        ran = len(calls)
        with ait.record(model, attention=True) as trace:
            actual = model(x, padding)
        assert len(calls) == 2 * ran and ran == (0 if grad else 2)
    assert torch.equal(actual, expected)
    first, second = trace[0].attention
    assert first.weights.shape == second.weights.shape == (IMAGES, TOKENS, TOKENS)
    layer = model.encoder.layers[0]
    y = layer.norm1(x) if norm_first else x
    weights = layer.self_attn(y, y, y, key_padding_mask=padding)[1].detach()
    heard = slice(None) if padding is None else ~padding
    assert_close(first.weights[heard], weights[heard], "weights")
    if padding is not None:
        assert float(first.weights.detach().masked_select(padding[:, None, :]).abs().max()) == 0
    ait.viz.attention_rollout(trace)


@contextlib.contextmanager
def calls_of_the_fused_kernel() -> Iterator[list[None]]:
    """Counts without a mode, which would keep PyTorch from the fused kernel."""
    calls: list[None] = []
    real = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Tensor:
        calls.append(None)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
        yield calls


def test_hosts_of_three_libraries_in_one_model_are_recorded_side_by_side() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    from transformers.models.vit.modeling_vit import ViTLayer

    config = transformers.ViTConfig(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=32)
    config._attn_implementation = "sdpa"

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.timm = timm.models.vision_transformer.Block(WIDTH, HEADS)
            self.torchvision = vision.EncoderBlock(HEADS, WIDTH, 32, 0.0, 0.0)
            self.transformers = ViTLayer(config)
            self.workspace = workspace()

        def forward(self, x: Tensor) -> Tensor:
            x = self.torchvision(self.timm(x))
            y = self.transformers(x)
            return self.workspace(y[0] if isinstance(y, tuple) else y)

    torch.manual_seed(1)
    model = Mixed().eval()
    x = torch.randn(IMAGES, TOKENS, WIDTH)
    with torch.no_grad():
        expected = model(x)
        with ait.record(model, attention=True) as trace:
            actual = model(x)
        y = model.torchvision.ln_1(model.timm(x))
        weights = model.torchvision.self_attention(y, y, y)[1]
    assert torch.equal(actual, expected)
    assert [each.before for each in trace[0].attention] == [0, 0, 0]
    assert_close(trace[0].attention[1].weights, weights, "torchvision")
    assert not torch.equal(trace[0].attention[0].weights, trace[0].attention[2].weights)


@pytest.mark.parametrize("call", ["F", "torch", "method", "module"])
def test_attention_that_is_written_out_is_recorded_once_and_other_softmaxes_are_not(call: str) -> None:
    softmax = {
        "F": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
        "torch": lambda x: torch.softmax(x, -1),
        "method": lambda x: x.softmax(3),
        "module": nn.Softmax(dim=-1),
    }[call]

    class Eager(Own):
        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.heads(x)
            x = x.softmax(-1) + (query @ value.mT).softmax(1).mean()  # neither is attention
            y = softmax(query @ key.mT * query.shape[-1] ** -0.5) @ value
            return x + y.transpose(1, 2).flatten(2) + torch.softmax(query, dim=-1).mean()

    torch.manual_seed(1)
    model = nn.Sequential(Eager(), workspace()).eval()
    x = torch.randn(IMAGES, TOKENS, WIDTH)
    with torch.no_grad():
        expected = model(x)
        with ait.record(model, attention=True) as trace:
            assert torch.equal(model(x), expected)
        (attention,) = trace[0].attention
        assert_close(attention.weights, weights_of(model[0], x), "weights")


def test_hosts_without_fused_attention_give_the_weights_that_they_give_with_it() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    options = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=32)
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **options))
    block = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    for host in (vit.eval(), block.eval()):
        ait.insert_workspace(host, layers="all", num_slots=4, slot_dim=4, num_heads=2)
        seen = {}
        for fused in (True, False):
            if host is vit:
                host.set_attn_implementation("sdpa" if fused else "eager")
            else:
                for each in host.blocks:
                    each.attn.fused_attn = fused
            with torch.no_grad(), ait.record(host, attention=True) as trace:
                host(images)
            assert [each.before for each in trace[0].attention] == [0, 1]
            seen[fused] = [each.weights for each in trace[0].attention]
        for one, other in zip(seen[True], seen[False], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_torchvision_host_is_rolled_out() -> None:
    torchvision = pytest.importorskip("torchvision")
    host = torchvision.models.VisionTransformer(32, 8, 2, HEADS, WIDTH, 32, num_classes=3).eval()
    ait.insert_workspace(host, layers="all", num_slots=4, slot_dim=4, num_heads=2)
    with torch.no_grad():
        expected = host(torch.ones(2, 3, 32, 32))
        with ait.record(host, attention=True) as trace:
            assert torch.equal(host(torch.ones(2, 3, 32, 32)), expected)
    assert [each.before for each in trace[0].attention] == [0, 1]
    assert ait.viz.attention_rollout(trace, batch_share=1).weights.shape == (2, 17, 17)


class Passing(TorchFunctionMode):
    """A mode of the user's, which keeps what is computed under it; questions about shapes are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += [func.__name__] if func.__name__ not in ("__get__", "dim") else []
        return func(*args, **(kwargs or {}))


class InsideMode(nn.Module):
    """Attention under a mode that the model enters itself."""

    def __init__(self, inner: nn.Module, mode: Passing) -> None:
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode:
            return self.inner(x)


def test_modes_of_the_model_see_the_same_calls_with_and_without_a_recording() -> None:
    torch.manual_seed(1)
    mode = Passing()
    parts = [Multihead(True), Own(), encoder_layer(True), workspace()]
    model = nn.Sequential(*(InsideMode(part, mode) for part in parts)).eval()
    x = torch.randn(IMAGES, TOKENS, WIDTH)
    with torch.no_grad():
        expected = model(x)
        without, mode.calls = mode.calls, []
        with ait.record(model, attention=True) as trace:
            actual = model(x)
    assert torch.equal(actual, expected) and mode.calls == without
    assert len(trace[0].attention) == 3


@pytest.mark.parametrize("outer_ends_first", [True, False])
def test_nested_recordings_see_the_same_and_may_end_in_any_order(outer_ends_first: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(Multihead(True), encoder_layer(True), Own(), workspace()).eval()
    outer, inner = ait.record(model, attention=True), ait.record(model, attention=True)
    with torch.no_grad():
        traces = [outer.__enter__(), inner.__enter__()]
        model(torch.randn(IMAGES, TOKENS, WIDTH))
        for each in (outer, inner) if outer_ends_first else (inner, outer):
            each.__exit__(None, None, None)
            model(torch.randn(IMAGES, TOKENS, WIDTH))
    assert sorted(len(trace) for trace in traces) == [1, 2]
    for one, other in zip(traces[0][0].attention, traces[1][0].attention, strict=True):
        assert torch.equal(one.weights, other.weights)
    assert [len(each.attention) for trace in traces for each in trace] == [3, 3, 3]
    assert hook_count(model) == 0 and not any("forward" in vars(module) for module in model.modules())


def test_a_failure_inside_attention_leaves_no_mode_and_the_next_pass_is_recorded() -> None:
    model = nn.Sequential(Multihead(True), encoder_layer(True), workspace()).eval()
    with torch.no_grad(), ait.record(model, attention=True) as trace:
        with pytest.raises((RuntimeError, AssertionError)):
            model(torch.randn(IMAGES, TOKENS, WIDTH + 1))
        assert _len_torch_function_stack() == 0
        model(torch.randn(IMAGES, TOKENS, WIDTH))
    assert [each.complete for each in trace] == [False, True] and len(trace[1].attention) == 2


def test_copies_and_pickles_of_layers_of_torch_made_inside_do_not_record() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(encoder_layer(True), Multihead(True), workspace()).eval()
    x = torch.randn(IMAGES, TOKENS, WIDTH)
    with torch.no_grad(), ait.record(model, attention=True) as trace:
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        expected = model(x)
        for each in copies:
            assert torch.equal(each(x), expected)
    assert [len(each.attention) for each in trace] == [2]
    assert copies[0][0].forward.__self__ is copies[0][0]


@pytest.mark.parametrize(
    "kind", [Own, lambda: Multihead(True), lambda: encoder_layer(True)], ids=["own", "mha", "layer"]
)
def test_under_autocast_weights_are_not_rounded(kind: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(kind(), workspace()).eval()
    x = torch.randn(IMAGES, TOKENS, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with ait.record(model, attention=True) as trace:
            assert torch.equal(model(x), expected)
    weights = trace[0].attention[0].weights
    assert weights.dtype == torch.float32
    assert float((weights.sum(-1) - 1).abs().max()) < 1e-6
    assert not torch.equal(weights, weights.bfloat16().float())


def test_tokens_that_may_see_nothing_get_no_weight_and_no_nan() -> None:
    padding = torch.zeros(IMAGES, TOKENS, dtype=torch.bool)
    padding[1] = True

    class Padded(Multihead):
        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
            return y.nan_to_num()

    model = nn.Sequential(Padded(True), workspace()).eval()
    with torch.no_grad(), ait.record(model, attention=True) as trace:
        model(torch.randn(IMAGES, TOKENS, WIDTH))
    sums = trace[0].attention[0].weights.sum(-1)
    assert_close(sums, (~padding).any(1, keepdim=True).float().expand_as(sums), "sums")
