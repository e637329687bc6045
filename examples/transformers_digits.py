"""A ViT of transformers with workspaces, on handwritten digits, with transformers' own Trainer."""

from __future__ import annotations

import tempfile

import torch
from digits_data import images_and_labels
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import ait

ACCUMULATE = 2


def make_model(**options: object) -> ViTForImageClassification:
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    return ait.insert_workspace(ViTForImageClassification(config), num_slots=16, **options)


def dataset() -> list[dict[str, torch.Tensor]]:
    return [dict(pixel_values=image, labels=label) for image, label in zip(*images_and_labels(), strict=True)]


def make_trainer(model: ViTForImageClassification, folder: str, **arguments: object) -> Trainer:
    options = dict(per_device_train_batch_size=32, gradient_accumulation_steps=ACCUMULATE, learning_rate=1e-3)
    settings = TrainingArguments(folder, report_to=[], save_strategy="no", **(options | arguments))
    trainer = Trainer(model, settings, train_dataset=dataset())

    def loss_factor() -> float:
        """What the trainer multiplies each loss by before the backward pass, which cannot see it."""
        scaler = trainer.accelerator.scaler  # of float16
        return (1.0 if scaler is None else scaler.get_scale()) / trainer.current_gradient_accumulation_steps

    ait.inject_balance_loss(model, scale=loss_factor)
    return trainer


def main(epochs: int = 3) -> None:
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(make_model(), folder, num_train_epochs=epochs, use_cpu=True).train()


if __name__ == "__main__":
    main()
