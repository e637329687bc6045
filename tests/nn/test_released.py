"""``semantics="released"`` against five recorded steps of the authors' own layer, in three configurations.

``tests/data/released_layer.npz`` was recorded in float64 with write dropout 0; weights stand still, the memory moves.
Configuration a is ordinary, b has no bottleneck (k = all tokens), c has one token a row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ait

RECORDING = Path(__file__).parent.parent / "data" / "released_layer.npz"
STEPS = 5
# The layer computes in float64 throughout; the recording's decay and CV^2 passed through float32 (2**-24 = 6e-8).
LAYER_TOLERANCE = 1e-6
ORACLE_TOLERANCE = 1e-9
# How the layer's parameters are called in the recording.
RECORDED_NAMES = {
    "fc1.weight": "fc1.weight",
    "fc1.bias": "fc1.bias",
    "fc2.weight": "fc2.weight",
    "fc2.bias": "fc2.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "workspace.writer.query.weight": "memoryupdate.mha.w_qs.weight",
    "workspace.writer.key.weight": "memoryupdate.mha.w_ks.weight",
    "workspace.writer.value.weight": "memoryupdate.mha.w_vs.weight",
    "workspace.writer.out.weight": "memoryupdate.mha.fc.weight",
    "workspace.writer.norm.weight": "memoryupdate.mha.layer_norm.weight",
    "workspace.writer.norm.bias": "memoryupdate.mha.layer_norm.bias",
    "workspace.reader.proj.weight": "fc3.weight",
    "workspace.reader.proj.bias": "fc3.bias",
    "workspace.memory.gamma": "memoryupdate.memory",
}


class Recording:
    """One configuration of the recording."""

    def __init__(self, name: str) -> None:
        with np.load(RECORDING) as data:
            self.arrays = {key[2:]: torch.from_numpy(data[key]) for key in data.files if key.startswith(f"{name}.")}
        self.beta = float(self.arrays["config"][-1])
        _, _, self.dim, self.hidden, self.slots, self.width, self.heads, self.k = (
            self.arrays["config"][:-1].int().tolist()
        )

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def weight(self, name: str) -> Tensor:
        """A parameter under the layer's name for it, in the layer's order of columns."""
        recorded = self.arrays[f"param.{RECORDED_NAMES[name]}"]
        if name == "workspace.writer.out.weight":
            # Columns (D, S) with S fastest there, (S, D) with D fastest here.
            return recorded.view(self.width, self.width, self.heads).transpose(1, 2).flatten(1)
        return recorded

    def gradient(self, step: int, name: str) -> Tensor | None:
        return self.arrays.get(f"{step}.grad.{RECORDED_NAMES[name]}")

    def layer(self, **arguments) -> ait.GlobalWorkspaceLayer:
        layer = ait.GlobalWorkspaceLayer(
            self.dim, hidden_dim=self.hidden, num_slots=self.slots, slot_dim=self.width, num_heads=self.heads,
            top_k=self.k, beta=self.beta, semantics="released", write_dropout=0.0, dtype=torch.float64, **arguments
        )  # fmt: skip
        weights = {name: self.weight(name) for name in RECORDED_NAMES}
        layer.load_state_dict(weights | {"workspace.memory.skipped_updates": torch.tensor(0)})
        return layer


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected entry."""
    scale = float(expected.abs().max())
    difference = float((actual.detach() - expected).abs().max())
    return difference / scale if scale else difference


def training_step(layer: ait.GlobalWorkspaceLayer, recording: Recording, step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Runs a recorded step; returns what came and what was recorded, by name."""
    layer.zero_grad()
    x = recording[f"{step}.x"].clone().requires_grad_()
    y = layer(x)
    loss = ait.balance_loss(layer)
    ((y * recording[f"{step}.grad_out"]).sum() + loss).backward()
    assert x.grad is not None
    compared = {
        "output": (y, recording[f"{step}.y"]),
        "balance loss": (loss, recording[f"{step}.aux"]),
        "memory": (layer.workspace.memory.gamma, recording[f"{step}.memory_after"]),
        "gradient of x": (x.grad, recording[f"{step}.grad_x"]),
    }
    for parameter_name, parameter in layer.named_parameters():
        gradient = recording.gradient(step, parameter_name)
        assert parameter.requires_grad == (gradient is not None), parameter_name
        if gradient is not None:
            assert parameter.grad is not None
            compared[f"gradient of {parameter_name}"] = (parameter.grad, gradient)
    return compared


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_layer_repeats_the_recorded_steps(name: str) -> None:
    recording = Recording(name)
    layer = recording.layer()
    for step in range(STEPS):
        for what, (actual, expected) in training_step(layer, recording, step).items():
            assert deviation(actual, expected) <= LAYER_TOLERANCE, f"step {step}: {what}"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_oracle_with_the_releases_float32_constants_repeats_the_recorded_steps(name: str) -> None:
    """The release's arithmetic, written down once: what the layer's 1e-6 is made of."""
    recording = Recording(name)
    decay = float(np.float32(0.9))
    memory = recording["param.memoryupdate.memory"]

    def squared_variation(values: Tensor) -> Tensor:
        # Two casts, not one: their gradients add up in float64.
        return values.float().var() / (values.float().mean() ** 2 + 1e-10)

    for step in range(STEPS):
        w = {n: recording.weight(n).clone().requires_grad_(recording.gradient(step, n) is not None)
             for n in RECORDED_NAMES}  # fmt: skip
        x = recording[f"{step}.x"].clone().requires_grad_()
        hidden = F.gelu(F.linear(x, w["fc1.weight"], w["fc1.bias"]))
        f = F.linear(hidden, w["fc2.weight"], w["fc2.bias"])
        f = F.layer_norm(f, (recording.dim,), w["norm.weight"], w["norm.bias"])
        tokens = f.flatten(0, 1)

        def heads(
            query: Tensor, tokens: Tensor = tokens, w: dict[str, Tensor] = w
        ) -> tuple[list[Tensor], list[Tensor]]:
            all_gates, answers = [], []
            for head in range(recording.heads):
                rows = slice(head * recording.width, (head + 1) * recording.width)
                keys = F.linear(tokens, w["workspace.writer.key.weight"][rows])
                logits = query[:, rows] @ keys.T / recording.width**0.5
                kept = logits.topk(recording.k, dim=-1)
                gates = torch.zeros_like(logits).scatter(1, kept.indices, torch.softmax(kept.values, dim=-1))
                all_gates.append(gates)
                answers.append(gates @ F.linear(tokens, w["workspace.writer.value.weight"][rows]))
            return all_gates, answers

        w_query = w["workspace.writer.query.weight"]
        asked = F.linear(memory, w_query).detach()
        with torch.no_grad():
            answer = F.linear(torch.cat(heads(asked)[1], dim=-1), w["workspace.writer.out.weight"]) + memory
            norm = w["workspace.writer.norm.weight"], w["workspace.writer.norm.bias"]
            mixture = decay * memory + (1 - decay) * F.layer_norm(answer, (recording.width,), *norm, eps=1e-6)
        # The mixture stands where the old memory stood by the time of the backward pass.
        found = F.linear(mixture, w_query)
        loss = torch.zeros(())
        for gates in heads(found + (asked - found).detach())[0]:
            loss = loss + (squared_variation(gates.sum(0)) + squared_variation((gates > 0).sum(0))) * 1e-2
        memory = mixture / mixture.norm(dim=-1, keepdim=True)
        patterns = F.linear(memory, w["workspace.reader.proj.weight"], w["workspace.reader.proj.bias"])
        y = (torch.softmax(recording.beta * tokens @ patterns.T, dim=-1) @ patterns).view_as(f) + f
        ((y * recording[f"{step}.grad_out"]).sum() + loss).backward()

        assert deviation(y, recording[f"{step}.y"]) <= ORACLE_TOLERANCE
        assert deviation(loss, recording[f"{step}.aux"]) <= ORACLE_TOLERANCE
        assert deviation(memory, recording[f"{step}.memory_after"]) <= ORACLE_TOLERANCE
        assert x.grad is not None and deviation(x.grad, recording[f"{step}.grad_x"]) <= ORACLE_TOLERANCE
        for parameter_name, parameter in w.items():
            gradient = recording.gradient(step, parameter_name)
            if gradient is not None:
                assert parameter.grad is not None
                assert deviation(parameter.grad, gradient) <= ORACLE_TOLERANCE, f"step {step}: {parameter_name}"


def test_evaluation_moves_the_memory_as_training_does() -> None:
    recording = Recording("a")
    layer = recording.layer().eval()
    for step in range(STEPS):
        with torch.no_grad():
            y = layer(recording[f"{step}.x"])
        assert deviation(y, recording[f"{step}.y"]) <= LAYER_TOLERANCE
        assert deviation(layer.workspace.memory.gamma, recording[f"{step}.memory_after"]) <= LAYER_TOLERANCE
        assert ait.balance_loss(layer) == 0


def test_frozen_memory_stands_still_in_evaluation_too() -> None:
    recording = Recording("a")
    layer = recording.layer().eval()
    ait.freeze_memory(layer)
    layer(recording["0.x"])
    assert torch.equal(layer.workspace.memory.gamma, recording["param.memoryupdate.memory"])


def test_stored_rows_are_read_as_they_are() -> None:
    recording = Recording("a")
    layer = recording.layer()
    norms = torch.linalg.vector_norm(ait.GlobalWorkspaceLayer(8, semantics="released").workspace.memory.gamma, dim=-1)
    assert norms.std() > 0.1, "starts as plain Gaussian rows"
    ait.freeze_memory(layer)
    y = layer(recording["0.x"])
    with torch.no_grad():
        layer.workspace.memory.gamma.mul_(2)
    assert not torch.allclose(layer(recording["0.x"]), y)
