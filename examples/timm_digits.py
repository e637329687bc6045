"""AiT from timm's registry on handwritten digits, trained as timm's own script does it.

timm's train.py does not come with its package; this is its loop in short, made of the package's own pieces: optimizer,
schedule, loss scaler, accumulated gradients, averaged weights. One line before it injects the balance loss.
"""

from __future__ import annotations

import timm
import torch
from digits_data import images_and_labels
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler
from torch import Tensor, nn

import ait
import ait.integrations.timm_models

ACCUMULATE = 2


def make_model(**options: object) -> nn.Module:
    sizes = dict(img_size=8, patch_size=2, in_chans=1, num_classes=10)
    return timm.create_model("ait_tiny_patch4_32", **(sizes | options))


def train_epoch(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss_scaler: NativeScaler,
    averaged: ModelEmaV3,
) -> float:
    """Goes once through batches of ``(images (B, C, H, W), labels (B,))``; returns the mean loss."""
    loss_fn, losses = LabelSmoothingCrossEntropy(0.1), AverageMeter()
    # As in the script, the last step of an epoch accumulates what is left.
    left = len(batches) % ACCUMULATE
    accumulated = ACCUMULATE
    with ait.inject_balance_loss(model, scale=lambda: loss_scaler._scaler.get_scale() / accumulated):
        model.train()
        optimizer.zero_grad()
        for index, (images, labels) in enumerate(batches):
            accumulated = left if index >= len(batches) - left else ACCUMULATE
            need_update = index == len(batches) - 1 or (index + 1) % ACCUMULATE == 0
            loss = loss_fn(model(images), labels)
            clipping = dict(clip_grad=1.0, parameters=model.parameters())
            loss_scaler(loss / accumulated, optimizer, need_update=need_update, **clipping)
            losses.update(loss.item(), len(labels))
            if need_update:
                averaged.update(model)
                optimizer.zero_grad()
    return losses.avg


def main(epochs: int = 3, batch_size: int = 32) -> float:
    """Returns the mean training loss of the last epoch."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-4)
    loss_scaler, averaged = NativeScaler(device="cpu"), ModelEmaV3(model, decay=0.9)
    images, labels = images_and_labels()
    for epoch in range(epochs):
        scheduler.step(epoch)
        batches = [(images[chosen], labels[chosen]) for chosen in torch.randperm(len(labels)).split(batch_size)]
        loss = train_epoch(model, batches, optimizer, loss_scaler, averaged)
        print(f"epoch {epoch}: loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    main()
