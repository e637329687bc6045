"""AiT from timm's registry on handwritten digits, with the pieces of which timm's train.py is made."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from digits_data import images_and_labels
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter

import ait
import ait.integrations.timm_models

ACCUMULATE = 2


def main(epochs: int = 3, batch_size: int = 32) -> float:
    """Returns the mean training loss of the last epoch."""
    torch.manual_seed(0)
    model = timm.create_model("ait_tiny_patch4_32", img_size=8, patch_size=2, in_chans=1, num_classes=10)
    ait.inject_balance_loss(model, scale=lambda: 1 / ACCUMULATE)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-4)
    images, labels = images_and_labels()
    for epoch in range(epochs):
        losses = AverageMeter()
        scheduler.step(epoch)
        for step, batch in enumerate(torch.randperm(len(labels)).split(batch_size)):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            (loss / ACCUMULATE).backward()
            losses.update(loss.item(), len(batch))
            if (step + 1) % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
        print(f"epoch {epoch}: loss {losses.avg:.3f}")
    return losses.avg


if __name__ == "__main__":
    main()
