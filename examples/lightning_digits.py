"""AiT on handwritten digits with Lightning; every optimiser step sees two batches."""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from digits_data import images_and_labels
from torch.utils.data import DataLoader, TensorDataset

import ait

ACCUMULATE = 2


class Digits(lightning.LightningModule):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.model = ait.create_model("ait_tiny", img_size=8, patch_size=2, in_chans=1, num_classes=10, **options)
        self.injection = ait.inject_balance_loss(self.model, scale=self.loss_factor)

    def loss_factor(self) -> float:
        """What Lightning multiplies each loss by before the backward pass, which cannot see it."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16
        return (1.0 if scaler is None else scaler.get_scale()) / self.trainer.accumulate_grad_batches

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        self.log("balance_loss", self.injection.last_loss())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batch_size: int = 32) -> DataLoader:
    images, labels = images_and_labels()
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)


def main(epochs: int = 3) -> None:
    lightning.seed_everything(0)
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer = lightning.Trainer(max_epochs=epochs, accumulate_grad_batches=ACCUMULATE, **options)
    trainer.fit(Digits(), loader())


if __name__ == "__main__":
    main()
