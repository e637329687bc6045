"""The examples with other libraries' trainers: the balance loss reaches the gradient, once and in the right amount."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import ait

SCALE = 1024.0  # of the gradient scalers


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PRECISIONS = ("float32", "float16")


def accumulated_by_hand(model, batches, forward, precision="float32") -> dict[str, torch.Tensor]:
    """Gradients of the mean over batches of task and balance loss, scaled and unscaled in float16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == "float16")
    half = torch.autocast("cpu", dtype=torch.float16, cache_enabled=False)
    for images, labels in batches:
        with half if precision == "float16" else contextlib.nullcontext():
            loss = F.cross_entropy(forward(model, images), labels) + ait.balance_loss(model)
        scaler.scale(loss / len(batches)).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.0))
    return gradients(model)


def assert_the_balance_loss_weighs(ours, plain, batches, forward) -> None:
    """Asserts that the gradients would be others without it."""
    for images, labels in batches:
        (F.cross_entropy(forward(plain, images), labels) / len(batches)).backward()
    without = gradients(plain)
    name = next(key for key in ours if key.endswith("writer.key.weight"))
    assert (ours[name] - without[name]).norm() > 0.1 * ours[name].norm()


def assert_equal_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lightning_accumulates_the_gradients_of_task_and_balance_loss(precision):
    lightning = pytest.importorskip("lightning")
    import lightning_digits

    torch.manual_seed(0)
    module = lightning_digits.Digits(write_dropout=0.0, top_k=8, balance_weight=1.0)
    plain = copy.deepcopy(module.model).train()
    without = copy.deepcopy(plain)
    batches = [(torch.rand(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(2)]
    seen = []
    module.on_before_optimizer_step = lambda optimizer: seen.append(gradients(module.model))
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    if precision == "float16":  # Lightning's own on a GPU; for the CPU it must be given
        from lightning.pytorch.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = lightning.Trainer(max_steps=1, accumulate_grad_batches=2, enable_model_summary=False, **options)
    tensors = (torch.cat(part) for part in zip(*batches, strict=True))
    trainer.fit(module, DataLoader(TensorDataset(*tensors), batch_size=8))
    assert len(seen) == 1

    def forward(model, images):
        return model(images)

    assert_equal_gradients(seen[0], accumulated_by_hand(plain, batches, forward, precision))
    assert_the_balance_loss_weighs(seen[0], without, batches, forward)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_transformers_trainer_accumulates_the_gradients_of_task_and_balance_loss(precision, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import transformers_digits

    transformers.set_seed(0)
    model = transformers_digits.make_model(top_k=8, balance_weight=1.0)
    with torch.no_grad():
        for _, module in ait.workspaces(model):
            module.gate.fill_(0.5)
    plain = copy.deepcopy(model).train()
    without = copy.deepcopy(plain)
    data = transformers_digits.dataset()[:12]
    monkeypatch.setattr(transformers_digits, "dataset", lambda: data)
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **kwargs):
            seen.append(gradients(model))

    arguments = dict(per_device_train_batch_size=4, num_train_epochs=1, max_grad_norm=0.0, learning_rate=0.0)
    arguments |= dict(fp16=precision == "float16", disable_tqdm=True, use_cpu=True)
    trainer = transformers_digits.make_trainer(model, str(tmp_path), **arguments)
    if precision == "float16":  # accelerate scales on accelerators alone, in the same places
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    trainer.add_callback(Watch())
    batches = []
    compute_loss = trainer.compute_loss

    def logits(net, images):
        return net(images).logits

    def watched(net, inputs, **kwargs):
        batches.append((inputs["pixel_values"].clone(), inputs["labels"].clone()))
        return compute_loss(net, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    assert len(seen) == 2 and len(batches) == 3
    for window, ours in zip((batches[:2], batches[2:]), seen, strict=True):  # the last step accumulates what is left
        plain.zero_grad()
        assert_equal_gradients(ours, accumulated_by_hand(plain, window, logits, precision))
    assert_the_balance_loss_weighs(seen[0], without, batches[:2], logits)


def test_timms_pieces_train_a_model_of_its_registry(monkeypatch):
    pytest.importorskip("timm")
    import timm_digits

    images, labels = timm_digits.images_and_labels()
    monkeypatch.setattr(timm_digits, "images_and_labels", lambda: (images[:640], labels[:640]))
    assert timm_digits.main(epochs=2, batch_size=32) < 0.9 * math.log(10)


def test_timms_loss_scaler_and_shorter_last_window_get_their_share_of_the_balance_loss(monkeypatch):
    pytest.importorskip("timm")
    import timm_digits
    from timm.utils import ModelEmaV3, NativeScaler

    torch.manual_seed(0)
    # A balance loss whose gradient is of the size of the other's.
    model = timm_digits.make_model(write_dropout=0.0, top_k=8, balance_weight=1.0)
    plain, without = copy.deepcopy(model), copy.deepcopy(model)
    batches = [(torch.rand(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(3)]
    monkeypatch.setattr("timm.utils.cuda.dispatch_clip_grad", lambda *_, **__: None)
    averaged = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    timm_digits.train_epoch(model, batches, optimizer, NativeScaler(device="cpu"), averaged)
    by_hand = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss_fn = timm_digits.LabelSmoothingCrossEntropy(0.1)
    for window, ours in zip((batches[:2], batches[2:]), seen, strict=True):
        by_hand.zero_grad()
        for images, labels in window:
            ((loss_fn(plain(images), labels) + ait.balance_loss(plain)) / len(window)).backward()
        assert_equal_gradients(ours, gradients(plain))
        by_hand.step()
    for images, labels in batches[:2]:
        (loss_fn(without(images), labels) / 2).backward()
    name = next(key for key in seen[0] if key.endswith("writer.key.weight"))
    assert (seen[0][name] - gradients(without)[name]).norm() > 0.5 * seen[0][name].norm()
    averaged.module.train()(batches[0][0])
    assert ait.balance_loss(averaged.module) > 0, "the averaged model has no injection"
