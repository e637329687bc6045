"""The examples with other libraries' trainers: the balance loss reaches the gradient, once and in the right amount."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import ait


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accumulated_by_hand(model, batches, forward) -> dict[str, torch.Tensor]:
    """Gradients of the mean over batches of task and balance loss."""
    for images, labels in batches:
        loss = F.cross_entropy(forward(model, images), labels) + ait.balance_loss(model)
        (loss / len(batches)).backward()
    return gradients(model)


def assert_equal_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_lightning_accumulates_the_gradients_of_task_and_balance_loss():
    lightning = pytest.importorskip("lightning")
    import lightning_digits

    torch.manual_seed(0)
    module = lightning_digits.Digits(write_dropout=0.0, top_k=8)
    plain = copy.deepcopy(module.model).train()
    batches = [(torch.rand(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(2)]
    seen = []
    module.on_before_optimizer_step = lambda optimizer: seen.append(gradients(module.model))
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = lightning.Trainer(max_steps=1, accumulate_grad_batches=2, enable_model_summary=False, **options)
    tensors = (torch.cat(part) for part in zip(*batches, strict=True))
    trainer.fit(module, DataLoader(TensorDataset(*tensors), batch_size=8))
    assert len(seen) == 1
    assert_equal_gradients(seen[0], accumulated_by_hand(plain, batches, lambda model, images: model(images)))


def test_transformers_trainer_accumulates_the_gradients_of_task_and_balance_loss(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import transformers_digits

    transformers.set_seed(0)
    model = transformers_digits.make_model(top_k=8)
    with torch.no_grad():
        for _, module in ait.workspaces(model):
            module.gate.fill_(0.5)
    plain = copy.deepcopy(model).train()
    data = transformers_digits.dataset()[:8]
    monkeypatch.setattr(transformers_digits, "dataset", lambda: data)
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **kwargs):
            seen.append(gradients(model))

    arguments = dict(per_device_train_batch_size=4, max_steps=1, max_grad_norm=0.0, disable_tqdm=True, use_cpu=True)
    trainer = transformers_digits.make_trainer(model, str(tmp_path), **arguments)
    trainer.add_callback(Watch())
    batches = []
    compute_loss = trainer.compute_loss

    def watched(net, inputs, **kwargs):
        batches.append((inputs["pixel_values"].clone(), inputs["labels"].clone()))
        return compute_loss(net, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    assert len(seen) == 1 and len(batches) == 2
    assert_equal_gradients(seen[0], accumulated_by_hand(plain, batches, lambda net, images: net(images).logits))


def test_timms_pieces_train_a_model_of_its_registry(capsys):
    pytest.importorskip("timm")
    import timm_digits

    assert timm_digits.main(epochs=2, batch_size=64) < 0.9 * math.log(10)
