"""What a recording holds is what the layer did."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ait
from ait.ops import hopfield_energy, hopfield_retrieve
from ait.recording.attention import SelfAttentionCapture
from ait.recording.recorder import Recorder
from ait.recording.statistics import perplexity
from tests.recording.models import IMAGES, hook_count, small_model, some_images
from tests.tolerances import assert_close

TOKENS = 16 * IMAGES


def workspace(**options: Any) -> ait.GlobalWorkspace:
    torch.manual_seed(1)
    return ait.GlobalWorkspace(8, **(dict(num_slots=4, slot_dim=6, num_heads=2, top_k=3) | options))


def record_one(layer: nn.Module, f: Tensor, *args: Any, **options: Any) -> ait.recording.LayerRecord:
    with ait.record(layer, **options) as trace:
        layer(f, *args)
    assert len(trace) == 1 and len(trace[0]) == 1
    return trace.layer(0)


def direct_write(
    layer: ait.GlobalWorkspace, memory: Tensor, tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gates ``(S, M, T)`` and the new memory without dropout, from the equations: keys and values of all tokens."""
    writer = layer.writer
    assert writer is not None
    heads, width, num_tokens = writer.num_heads, writer.slot_dim, tokens.shape[0]
    query = writer.query(memory).view(-1, heads, width).transpose(0, 1)
    key = writer.key(tokens).view(-1, heads, width).transpose(0, 1)
    value = writer.value(tokens).view(-1, heads, width).transpose(0, 1)
    logits = query @ key.mT / width**0.5
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    kept = logits.topk(min(layer.capacity(num_tokens), num_tokens), dim=-1).indices
    closed = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
    gates = torch.softmax(logits.masked_fill(closed, -torch.inf), dim=-1)
    answer = writer.out((gates @ value).transpose(0, 1).flatten(1))
    mixed = torch.lerp(memory, writer.norm(answer + memory), layer.alpha)
    return gates, mixed / mixed.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("options", [{}, dict(top_k=None, top_k_ratio=1.0), dict(num_slots=12, slot_dim=3)], ids=str)
def test_gates_importance_load_and_memory_are_those_of_the_equations(
    options: dict[str, Any], padded: bool, training: bool
) -> None:
    layer = workspace(write_dropout=0.0, **options).train(training)
    f = torch.randn(2, 5, 8)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    stored = layer.memory.gamma.clone()
    before = layer.memory.as_read(stored)
    with torch.no_grad():
        gates, memory = direct_write(layer, before, f.flatten(0, 1), mask.flatten() if padded else None)
    seen = record_one(layer, f, mask if padded else None)
    write = seen.write
    assert write is not None and write.kept == training
    assert_close(write.dense_gates(), gates, "gates")
    assert_close(write.importance, gates.sum(1), "importance")
    assert_close(write.load, (gates > 0).sum(1).float(), "load")
    assert_close(write.memory, memory, "memory")
    assert_close(write.row_perplexity, perplexity(gates), "perplexity")
    assert torch.equal(seen.memory_before, before)
    assert torch.equal(seen.memory_after, layer.memory.gamma if training else before)
    if training:
        assert torch.equal(write.memory, layer.memory.gamma)
        assert torch.equal(seen.moved, (layer.memory.gamma - before).norm(dim=-1)) and float(seen.moved.min()) > 0
    else:
        assert torch.equal(layer.memory.gamma, stored) and float(seen.moved.max()) == 0


def test_the_kept_write_is_the_layers_own_with_its_dropout() -> None:
    layer = workspace(write_dropout=0.5).train()
    seen = record_one(layer, torch.randn(2, 5, 8))
    assert seen.write is not None and torch.equal(seen.write.memory, layer.memory.gamma)


@pytest.mark.parametrize("steps, tol", [(1, 0.0), (3, 0.0), (50, 1e-2)])
def test_retrieval_weights_rebuild_the_tokens_and_energies_are_those_before_and_after(steps: int, tol: float) -> None:
    layer = workspace(steps=steps, tol=tol, beta=2.0).eval()
    f = torch.randn(3, 4, 8)
    seen = record_one(layer, f, keep_tokens=True)
    assert seen.patterns is not None and seen.tokens is not None and seen.retrieved is not None
    assert torch.equal(seen.tokens, f.flatten(0, 1)) and torch.equal(seen.retrieved, layer(f).flatten(0, 1))
    assert_close(seen.retrieval @ seen.patterns, seen.retrieved, "retrieved")
    assert_close(seen.retrieval.sum(-1), torch.ones(12), "sum of weights")
    if tol:
        taken = hopfield_retrieve(seen.tokens, seen.patterns, 2.0, steps, tol)[1]
        assert len(taken.unique()) > 1 and int(taken.max()) < steps
    assert torch.equal(seen.energy_before, hopfield_energy(seen.tokens, seen.patterns, 2.0))
    assert torch.equal(seen.energy_after, hopfield_energy(seen.retrieved, seen.patterns, 2.0))
    assert seen.energy_before is not None and bool((seen.energy_after <= seen.energy_before * (1 + 1e-4)).all())
    assert torch.equal(seen.pattern, seen.retrieval.argmax(-1))


def test_the_energy_path_begins_and_ends_at_the_layers_own_energies_and_never_rises() -> None:
    layer = workspace(steps=4).eval()
    seen = record_one(layer, torch.randn(3, 4, 8), energy_steps=4)
    path = seen.energy_path
    assert path is not None and path.shape == (5, 12)
    assert seen.energy_before is not None and seen.energy_after is not None
    assert_close(path[0], seen.energy_before, "before")
    assert_close(path[-1], seen.energy_after, "after")
    assert bool((path.diff(dim=0) <= 1e-4 * path[:-1].abs()).all())


def test_an_attention_reader_has_weights_and_no_energy() -> None:
    layer = workspace(reader="attention").eval()
    f = torch.randn(3, 4, 8)
    seen = record_one(layer, f)
    assert seen.energy_before is None and seen.energy_after is None and seen.patterns is None and seen.beta is None
    reader: Any = layer.reader
    query, key = reader.query(f.flatten(0, 1)), reader.key(layer.memory.gamma)
    query, key = (x.view(-1, 2, 6).transpose(0, 1) for x in (query, key))
    assert_close(seen.retrieval, torch.softmax(query @ key.mT / 6**0.5, -1).mean(0).detach(), "weights")


@pytest.mark.parametrize("memory", ["learned", "fixed"])
def test_a_memory_without_writer_has_no_write_and_does_not_move(memory: Any) -> None:
    layer = workspace(memory=memory).train()
    seen = record_one(layer, torch.randn(3, 4, 8))
    assert seen.write is None and float(seen.moved.abs().max()) == 0
    with torch.no_grad():
        expected = seen.memory_after.clone()
        layer.memory.gamma.add_(1)  # as an optimiser would
    assert torch.equal(seen.memory_after, expected)


def test_released_semantics_keep_the_write_in_eval_and_as_run_computes_none_that_is_not_kept() -> None:
    f = torch.randn(3, 4, 8)
    released = record_one(workspace(semantics="released").eval(), f, write="as_run")
    assert released.write is not None and released.write.kept and float(released.moved.min()) > 0
    assert record_one(workspace().eval(), f, write="as_run").write is None
    frozen = workspace().train()
    ait.freeze_memory(frozen)
    seen = record_one(frozen, f)
    assert seen.write is not None and not seen.write.kept


def test_batches_of_padding_or_of_non_finite_tokens_are_writes_that_are_not_kept() -> None:
    layer = workspace().train()
    seen = record_one(layer, torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert seen.write is not None and not seen.write.kept and float(seen.write.load.sum()) == 0
    assert float(seen.slot_perplexity) == 0  # no token that is no padding
    seen = record_one(layer, torch.full((2, 3, 8), torch.nan))
    assert seen.write is not None and not seen.write.kept
    assert int(layer.memory.skipped_updates) == 1


def test_an_empty_batch_is_recorded_without_a_write() -> None:
    seen = record_one(workspace().train(), torch.randn(0, 3, 8))
    assert seen.write is None and seen.retrieval.shape == (0, 4) and seen.batch == 0


def test_slot_use_leaves_padding_out_and_names_dead_slots() -> None:
    layer = workspace().eval()
    with torch.no_grad():
        layer.reader.proj.weight.zero_()
        layer.reader.proj.weight[:4, :4] = 20 * torch.eye(4)
        layer.reader.proj.bias.zero_()
        layer.memory.gamma.zero_()
        layer.memory.gamma[:, :4] = torch.eye(4)
    f = torch.zeros(1, 4, 8)
    f[0, range(4), [0, 0, 1, 3]] = 1.0
    mask = torch.tensor([[False, False, False, True]])
    seen = record_one(layer, f, mask)
    assert seen.pattern.tolist() == [0, 0, 1, 3]
    assert_close(seen.slot_use, torch.tensor([2 / 3, 1 / 3, 0, 0]), "use", torch.float16)
    assert seen.dead_slots().tolist() == [2, 3]
    expected = 3 / 2 ** (2 / 3)  # exp of the entropy of (2/3, 1/3)
    assert float(seen.slot_perplexity) == pytest.approx(expected, rel=1e-3)


def test_shapes_grid_and_prefix_come_from_the_model() -> None:
    model = small_model(question_dim=5)
    with ait.record(model) as trace:
        model(some_images(), torch.randn(IMAGES, 5))
    seen = trace.layer("blocks.1.mlp.workspace")
    assert (seen.shape, seen.grid, seen.prefix_tokens) == ((IMAGES, 17), (4, 4), 1)
    assert (seen.batch, seen.tokens_per_image, seen.num_slots) == (IMAGES, 17, 4)
    assert seen.by_image(seen.pattern).shape == (IMAGES, 17)
    seen = record_one(workspace(), torch.randn(2, 3, 4, 8))
    assert (seen.shape, seen.grid, seen.prefix_tokens) == ((2, 3, 4), (3, 4), 0)


def test_several_passes_nested_recordings_and_chosen_layers() -> None:
    model = small_model().train()
    with ait.record(model, layers=[-1]) as outer:
        model(some_images(0))
        with ait.record(model, layers="blocks.0", max_passes=1) as inner:
            model(some_images(1))
            model(some_images(2))
        model(some_images(3))
    assert [list(each.layers) for each in outer] == [["blocks.1.mlp.workspace"]] * 4
    assert [list(each.layers) for each in inner] == [["blocks.0.mlp.workspace"]]
    before, after = outer.layer(0, 2), outer.layer(0, 3)
    assert_close(after.memory_before, before.memory_after, "memory between passes")


def test_calls_of_a_part_of_the_model_are_passes_and_shared_layers_are_numbered() -> None:
    model = small_model().eval()
    with ait.record(model) as trace:
        model.forward_features(some_images())
        model.forward_features(some_images())
        model(some_images())
        model.forward_features(some_images())
    assert [len(each) for each in trace] == [2, 2, 2, 2]

    layer = ait.GlobalWorkspaceLayer(8, num_slots=4, slot_dim=6, num_heads=2)
    shared = nn.Sequential(layer, layer, layer)
    with ait.record(shared) as trace:
        shared(torch.randn(2, 5, 8))
    assert trace.layer_names == ["0.workspace", "0.workspace#1", "0.workspace#2"]
    assert_close(trace.layer(1).memory_before, trace.layer(0).memory_after, "memory between calls")


def test_layers_go_by_the_name_of_the_module_around_them_and_records_show_shapes_and_not_entries() -> None:
    model = small_model().eval()
    with ait.record(model) as trace:
        model(some_images())
    assert trace.layer("blocks.1") is trace.layer(1) is trace[0]["blocks.1.mlp"]
    assert repr(trace) == (
        "Trace(AssociativeTransformer, 1 pass, 2 layers, 'blocks.0.mlp.workspace' to 'blocks.1.mlp.workspace')"
    )
    shown = repr(trace.layer(0))
    assert "retrieval=(64, 4) float32" in shown and "gates=(2, 4, 8) float32" in shown and "tensor" not in shown
    assert "layers=[blocks.0.mlp.workspace, blocks.1.mlp.workspace]" in repr(trace[0])
    header, *lines = trace.summary().splitlines()
    assert header.split("  ")[0] == "layer" and "dead slots" in header and "energy after" in header
    assert [line.split()[0] for line in lines] == trace.layer_names
    assert float(lines[0].split()[1]) == pytest.approx(float(trace.layer(0).slot_perplexity), rel=1e-3)


def test_records_are_copies_on_the_device_asked_for_and_inputs_are_the_first_tensor() -> None:
    model = small_model().eval()
    images = some_images()
    with ait.record(model, keep_inputs=True, device="cpu") as trace:
        model(images)
    assert torch.equal(trace[0].inputs, images)
    images.zero_()
    assert float(trace[0].inputs.abs().max()) > 0


def test_records_that_are_not_detached_carry_gradients() -> None:
    model = small_model().train()
    with ait.record(model, detach=False) as trace:
        model(some_images())
    write = trace.layer(0).write
    assert write is not None
    (write.row_perplexity.sum() + trace.layer(1).slot_perplexity).backward()
    for name in ("writer.key", "writer.query", "reader.proj"):
        grad = model.get_submodule(f"blocks.0.mlp.workspace.{name}").weight.grad
        assert grad is not None and float(grad.abs().max()) > 0, name


def test_wrappers_are_taken_off(tmp_path: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_model().train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with ait.record(wrapped) as trace:
            wrapped(some_images()).sum().backward()
    finally:
        dist.destroy_process_group()
    assert trace.model == "AssociativeTransformer" and len(trace) == 1 and trace[0].complete
    assert trace.layer_names == ["blocks.0.mlp.workspace", "blocks.1.mlp.workspace"]


def test_recordings_of_attention_may_end_in_the_order_in_which_they_began() -> None:
    model = small_model().eval()
    first, second = (Recorder(model, attention=True) for _ in range(2))
    first.start()
    second.start()
    model(some_images(0))
    first.stop()
    with Counting() as counting:
        model(some_images(1))
        second.stop()
        torch.relu(torch.zeros(1))
    assert counting.relus > 0, "a mode of the caller's stays"
    assert [len(each.attention) for each in first.trace] == [2]
    assert [len(each.attention) for each in second.trace] == [2, 2]
    assert hook_count(model) == 0


def test_a_recording_that_fails_to_begin_leaves_nothing_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().eval()
    recorder = Recorder(model, attention=True)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SelfAttentionCapture, "start", fail)
        with pytest.raises(KeyboardInterrupt):
            recorder.start()
    assert hook_count(model) == 0
    recorder.start()
    model(some_images())
    recorder.stop()
    assert len(recorder.trace) == 1 and len(recorder.trace[0].attention) == 2


class Counting(TorchFunctionMode):
    relus = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.relus += func is torch.relu
        return func(*args, **(kwargs or {}))
