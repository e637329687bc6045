"""Rollout through attention and workspace: shares that add up, and the product of matrices written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ait
from ait.recording.rollout import attention_rollout
from tests.recording.models import IMAGES, small_model, some_images
from tests.tolerances import assert_close

TOKENS = 16


def recorded(training: bool, **options: Any) -> ait.Trace:
    model = small_model(**options).train(training)
    with ait.record(model, attention=True) as trace:
        model(some_images())
    return trace


def direct(trace: ait.Trace, attention: float, workspace: float, share: float) -> Tensor:
    """``(T, T)``: the product of the layers' matrices over all tokens of the batch."""
    product = torch.eye(TOKENS * IMAGES, dtype=torch.float64)
    for attended, layer in zip(trace[0].attention, trace[0], strict=True):
        a = torch.block_diag(*attended.weights.double())
        gates = layer.require_write("test").dense_gates().double().mean(0)
        for weight, matrix in ((attention, a), (workspace, share * layer.retrieval.double() @ gates)):
            product = ((1 - weight) * torch.eye(len(a), dtype=torch.float64) + weight * matrix) @ product
    return product


@pytest.mark.parametrize("attention, workspace, share", [(0.5, 0.5, 1.0), (0.3, 0.8, 0.4), (0.5, 0.0, 1.0)])
def test_shares_are_the_product_of_the_layers_matrices(attention: float, workspace: float, share: float) -> None:
    trace = recorded(training=True)
    product = direct(trace, attention, workspace, share).view(IMAGES, TOKENS, IMAGES, TOKENS)
    rollout = attention_rollout(
        trace, attention_weight=attention, workspace_weight=workspace, batch_share=share, images=[2, -1]
    )
    assert rollout.images == [2, IMAGES - 1]
    for row, image in enumerate(rollout.images):
        own = product[image, :, image]
        assert_close(rollout.weights[row], own.float(), "weights")
        others = product[image].sum((1, 2)) - own.sum(1)
        # Gates and weights in float32 sum to 1 within its rounding, and these are what is left of 1.
        torch.testing.assert_close(rollout.others[row].double(), others, rtol=0, atol=1e-6)
        torch.testing.assert_close(rollout.memory[row].double(), 1 - product[image].sum((1, 2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_shares_of_each_token_sum_to_one_and_in_eval_nothing_comes_from_other_images(training: bool) -> None:
    rollout = attention_rollout(recorded(training))
    total = rollout.weights.sum(-1) + rollout.others + rollout.memory
    assert_close(total, torch.ones_like(total), "total")
    assert (float(rollout.others.max()) > 1e-3) == training
    assert float(rollout.memory.min()) > 0.1


def test_without_workspaces_it_is_the_plain_rollout() -> None:
    rollout = attention_rollout(recorded(training=False), workspace_weight=0)
    assert float(rollout.memory.max()) == float(rollout.others.max()) == 0
    assert_close(rollout.weights.sum(-1), torch.ones(IMAGES, TOKENS), "rows")


def test_recorded_attention_is_that_of_the_equations() -> None:
    model = small_model().eval()
    with ait.record(model, attention=True) as trace:
        model(some_images())
    first = model.get_submodule("blocks.0")
    x = model.patch_embed(some_images())
    query, key, _ = first.attn.qkv(first.norm1(x)).view(IMAGES, TOKENS, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = torch.softmax(query @ key.mT / 8**0.5, -1).mean(1)
    assert [each.before for each in trace[0].attention] == [0, 1]
    assert_close(trace[0].attention[0].weights, expected.detach(), "weights")


def test_an_attention_reader_is_not_taken_for_self_attention() -> None:
    trace = recorded(training=True, reader="attention", top_k_ratio=1.0)
    assert len(trace[0].attention) == 2
    attention_rollout(trace)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_multihead_attention_of_torch_keeps_its_outputs_and_gives_the_weights_that_it_returns(
    batch_first: bool, training: bool
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.workspace = ait.GlobalWorkspace(8, num_slots=4, slot_dim=6, num_heads=2)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            padding = torch.zeros(3, 5, dtype=torch.bool)
            padding[0, 4] = True
            y, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
            return self.workspace(y if batch_first else y.transpose(0, 1))

    torch.manual_seed(1)
    model = Block().train(training)
    x = torch.randn(3, 5, 8)
    with torch.set_grad_enabled(training):
        memory = model.workspace.memory.gamma.clone()
        torch.manual_seed(2)
        expected = model(x)
        model.workspace.memory.gamma.copy_(memory) if not training else model.workspace.memory.load_state_dict(
            {"gamma": memory, "skipped_updates": torch.zeros((), dtype=torch.int64)}
        )
        torch.manual_seed(2)
        with ait.record(model, attention=True) as trace:
            actual = model(x)
    assert torch.equal(actual, expected)
    y = x if batch_first else x.transpose(0, 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 4] = True
    weights = model.attention(y, y, y, key_padding_mask=padding)[1].detach()
    assert_close(trace[0].attention[0].weights, weights, "weights")


def test_hosts_of_other_libraries_are_rolled_out_with_their_class_token() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    config = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, hidden_size=16)
    hosts = [
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=192, num_classes=3),
        transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **config)),
    ]
    for host in hosts:
        host.eval()
        ait.insert_workspace(host, layers="all", num_slots=4, slot_dim=4, num_heads=2)
        with torch.no_grad(), ait.record(host, attention=True) as trace:
            host(torch.randn(2, 3, 32, 32))
        assert (trace.layer(0).grid, trace.layer(0).prefix_tokens) == ((4, 4), 1)
        assert [each.before for each in trace[0].attention] == [0, 1]
        rollout = attention_rollout(trace, batch_share=1)
        assert rollout.weights.shape == (2, 17, 17) and float(rollout.others.min()) > 0


def test_errors_say_what_is_missing() -> None:
    model = small_model().eval()
    with ait.record(model) as trace:
        model(some_images())
    with pytest.raises(ValueError, match=r"expected recorded self-attention.*attention=True.*set_fused_attn"):
        attention_rollout(trace)
    with ait.record(model, attention=True, write="as_run") as trace:
        model(some_images())
    attention_rollout(trace)
    with pytest.raises(ValueError, match="attention_rollout: expected a write of layer"):
        attention_rollout(trace, batch_share=1)
    for options, expected in (
        (dict(images=[4]), "images of the recorded batch, 0 to 3, got 4"),
        (dict(images=[]), "at least one image"),
        (dict(attention_weight=2), r"attention_weight to be a finite number in \[0, 1\]"),
        (dict(batch_share=-1), r"batch_share to be a finite number in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=expected):
            attention_rollout(trace, **options)  # type: ignore[arg-type]
    trace[0].attention[0].weights = torch.rand(8, 8, 8)
    with pytest.raises(ValueError, match="on the same B images of N tokens, got 4 x 16, 8 x 8"):
        attention_rollout(trace)
