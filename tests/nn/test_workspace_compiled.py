"""The layer under torch.compile and torch.export. Inductor, since it has elided copies of the memory before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ait
from ait.ops.reference import importance_and_load
from tests.nn.test_workspace import make_layer, weigh
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "arguments",
    [dict(top_k=None, top_k_ratio=0.3), dict(semantics="released", num_slots=21)],
    ids=["differentiable", "released, on keys"],
)
def test_inductor_equals_eager_over_consecutive_steps_with_dynamic_token_counts(arguments: dict[str, Any]) -> None:
    eager = make_layer(**arguments)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    # Two images or more, so that no size is specialised to 1.
    for step, tokens in enumerate((7, 9, 6)):
        batch, mask = torch.randn(4, tokens, 16), torch.rand(4, tokens) < 0.3
        gradients, outputs = [], []
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for layer, run in ((eager, eager), (model, compiled)):
                x = batch.clone().requires_grad_()
                output = run(x, mask)
                loss = ait.balance_loss(run)
                (weigh(output) + loss).backward()
                outputs.append({"output": output.detach(), "balance loss": loss.detach()})
                gradients.append({"x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.requires_grad})
                with torch.no_grad():
                    for p in layer.parameters():
                        if p.grad is not None:
                            p -= 1e-3 * p.grad
                            p.grad = None
        for expected, result in (outputs, gradients):
            assert result.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(result[name], value, f"step {step}: {name}")
        assert_close(model.workspace.memory.gamma, eager.workspace.memory.gamma, f"step {step}: memory")
        with pytest.raises(RuntimeError, match="balance_loss: expected a forward pass"):
            ait.balance_loss(compiled)
    assert not model.workspace._records.records, "they are for eager passes alone"

    before = model.workspace.memory.gamma.clone()
    compiled(torch.full((4, 6, 16), torch.nan, requires_grad=True), mask)
    assert torch.equal(model.workspace.memory.gamma, before)
    assert model.workspace.memory.skipped_updates == 1


def test_sums_of_gates_are_exact_under_inductor() -> None:
    indices = torch.rand(6, 9).topk(4).indices.sort().values
    gates = torch.softmax(20 * torch.randn(6, 4, dtype=torch.float64), dim=-1)
    sums = torch.compile(importance_and_load, fullgraph=True)(gates, indices, 9, 2)
    assert torch.equal(sums, importance_and_load(gates, indices, 9, 2))
    unrounded = torch.zeros(2, 9, dtype=torch.float64).scatter_add(1, indices.view(2, -1), gates.view(2, -1))
    assert not torch.equal(sums[0], unrounded), "or the rounding was left out"


def test_losses_are_collected_under_compile() -> None:
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x, mask = torch.randn(4, 7, 16), torch.zeros(4, 7, dtype=torch.bool)
    with ait.balance_losses(compiled) as losses:
        compiled(x, mask)
        first = ait.balance_loss(compiled)
        compiled(x, mask)
    assert len(losses) == 2 and losses[0] is first and losses[1] is not first
    sum(losses).backward()
    assert layer.fc1.weight.grad is not None


def test_exported_program_equals_the_layer_in_eval() -> None:
    layer = make_layer()
    layer(torch.randn(4, 7, 16))
    layer.eval()
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(layer, (torch.randn(4, 7, 16),), dynamic_shapes=dynamic).module()
    x = torch.randn(3, 9, 16)
    assert_close(program(x).detach(), layer(x).detach())
