"""Recording changes nothing: outputs, gradients, memories, random numbers, and the operators that run without it."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ait
from tests.recording.models import all_states, hook_count, small_model, some_images

EVERYTHING: dict[str, Any] = dict(attention=True, energy_steps=2, keep_tokens=True, keep_inputs=True, device="cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "differentiable": {},
    "released": dict(semantics="released"),
    "learned memory": dict(memory="learned"),
    "fixed memory": dict(memory="fixed"),
    "attention reader": dict(reader="attention"),
    "no bottleneck": dict(top_k_ratio=1.0),
    "selection on keys": dict(num_slots=8, slot_dim=4),
    "several steps": dict(steps=3, tol=1e-3),
    "bfloat16 parameters": dict(dtype=torch.bfloat16),
}


def run(model: nn.Module, training: bool, recording: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two steps of training, or two batches of evaluation, and all that they leave behind."""
    model.train(training)
    torch.manual_seed(3)
    results: dict[str, Tensor] = {}
    for step in range(2):
        images = some_images(step).to(dtype).requires_grad_()
        with ait.record(model, **EVERYTHING) if recording else contextlib.nullcontext():
            logits = model(images)
        loss = logits.float().square().mean() + ait.balance_loss(model)
        loss.backward()
        assert images.grad is not None
        results |= {f"logits {step}": logits.detach(), f"loss {step}": loss.detach(), f"grad {step}": images.grad}
    grads = {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | grads | all_states(model) | {"random": torch.get_rng_state()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_gradients_memory_and_random_numbers_are_bit_identical_with_recording(
    name: str, training: bool
) -> None:
    options = VARIANTS[name]
    dtype = options.get("dtype", torch.float32)
    expected = run(small_model(**options), training, False, dtype)
    actual = run(small_model(**options), training, True, dtype)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_autograd_outputs_are_bit_identical_and_records_are_ordinary_tensors(
    context: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    model = small_model().eval()
    with context():
        expected = model(some_images())
        with ait.record(model) as trace:
            actual = model(some_images())
    assert torch.equal(actual, expected)
    assert not trace.layer(0).retrieval.is_inference()
    trace.layer(0).retrieval.mul_(2)


def test_under_autocast_outputs_are_bit_identical_and_records_are_not_rounded() -> None:
    model = small_model().eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(some_images())
        with ait.record(model, keep_tokens=True) as trace:
            actual = model(some_images())
    assert torch.equal(actual, expected)
    layer = trace.layer(0)
    assert layer.tokens is not None and layer.patterns is not None and layer.beta is not None
    weights = torch.softmax(layer.beta * (layer.tokens.float() @ layer.patterns.T), dim=-1)
    assert torch.equal(layer.retrieval, weights)


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_operators(model: nn.Module) -> Counter[str]:
    model.zero_grad()
    with CountOperators() as mode:
        model(some_images()).sum().backward()
    return mode.counts


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_after_a_recording_the_same_operators_run_as_before_it_and_no_hook_is_left(training: bool) -> None:
    model = small_model().train(training)
    assert hook_count(model) == 0
    before = count_operators(model)
    with ait.record(model, **EVERYTHING) as trace:
        assert hook_count(model) > 0
        during = count_operators(model)
    assert len(trace) == 1
    assert hook_count(model) == 0
    after = count_operators(model)
    assert after == before, after - before
    # What a recording computes is hidden from modes around the model, too.
    assert during == before, during - before


def test_an_exception_inside_the_block_takes_the_hooks_out_and_leaves_what_was_recorded() -> None:
    model = small_model()
    with pytest.raises(KeyError, match="mine"), ait.record(model) as trace:
        model(some_images())
        raise KeyError("mine")
    assert hook_count(model) == 0 and len(trace) == 1


def test_a_forward_pass_that_fails_is_marked_and_the_next_one_is_recorded() -> None:
    model = small_model()

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise KeyError("mine")

    with ait.record(model) as trace:
        handle = model.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(some_images())
        handle.remove()
        model(some_images())
        with pytest.raises(ValueError, match="key_padding_mask"):
            model.blocks[0].mlp(torch.randn(1, 3, 16), torch.zeros(2, dtype=torch.bool))
        model(some_images())
    assert [each.complete for each in trace] == [False, True, True]
    assert [len(each) for each in trace] == [1, 2, 2]


def test_copies_and_pickles_made_inside_do_not_record() -> None:
    model = small_model().eval()
    with ait.record(model) as trace:
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        expected = model(some_images())
        assert torch.equal(copied(some_images()), expected)
        assert torch.equal(pickled(some_images()), expected)
    assert len(trace) == 1


def checkpointed(model: nn.Module, images: Tensor, use_reentrant: bool, **options: Any) -> Tensor:
    tokens = model.patch_embed(images)
    for block in model.blocks:
        tokens = checkpoint(block, tokens, use_reentrant=use_reentrant, **options)
    return model.forward_head(tokens)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward inside", "backward outside"])
def test_under_checkpointing_each_pass_is_recorded_once_and_gradients_are_bit_identical(
    use_reentrant: bool, backward_inside: bool
) -> None:
    grads = []
    for recording in (False, True):
        model = small_model().train()
        torch.manual_seed(3)
        images = some_images().requires_grad_()
        with contextlib.ExitStack() as stack:
            if recording:
                trace = stack.enter_context(ait.record(model))
            loss = checkpointed(model, images, use_reentrant).square().mean()
            loss = loss + ait.balance_loss(model)
            if not backward_inside:
                stack.close()
            loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | all_states(model))
    assert [list(each.layers) for each in trace] == [["blocks.0.mlp.workspace", "blocks.1.mlp.workspace"]]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name
