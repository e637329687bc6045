"""Parameter-efficient transfer: a frozen ViT of CIFAR-10 learns CIFAR-100 with LoRA, with workspaces, or with both.

    python experiments/transfer.py --data-dir data/cifar100 --threads 1
    python experiments/transfer.py --table

The shipped vit_tiny.cifar10 gets a new classifier, and its backbone stands still. Four arms differ in what else learns:
nothing (head), low-rank adapters of the attention (lora, by the peft package), an inserted workspace in every block
(workspace), or both (lora-workspace). All see the same images, as often, in the same order. Each arm's learning rate is
chosen on validation images, by as many shorter trials for each arm; then it is trained once for every seed, and each of
those runs reads the test set once. Every trial and run writes one JSON file; the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evaluate import answers_right
from results import environment, git_revision, intervals_overlap, wilson_interval, write_json
from torch import Tensor, nn
from train import Schedule, parameter_groups

import ait
from ait.data import ImageDataset, load_images, normalize, random_crop, random_horizontal_flip, stratified_choice

try:
    import tyro
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm
except ImportError as missing:
    raise ImportError(f'experiments: {missing}; pip install peft "associative-transformer[train]"') from missing

ARMS = ("head", "lora", "workspace", "lora-workspace")
RESULTS = Path(__file__).parent / "results" / "transfer"


@dataclass(frozen=True)
class Config:
    """The budget, which is the same for all arms."""

    data_dir: Path | None = None
    """Folder with CIFAR-100, as train.py takes it."""
    out: Path = RESULTS
    """Folder of the JSON files."""
    table: bool = False
    """Print the table of what is there, and do nothing else."""
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates that are tried, one epoch each, with seed 0."""
    epochs: int = 3
    train_images: int = 6_000
    """A fixed stratified choice among the 45,000."""
    validation_images: int = 2_000
    """The same among the 5,000."""
    test_images: int = 10_000
    batch_size: int = 64
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    final_lr_ratio: float = 0.01
    weight_decay: float = 0.05
    """Of the matrices."""
    clip_norm: float = 1.0
    rank: int = 16
    """Of LoRA, on the attention's qkv and proj; alpha is the same number."""
    num_slots: int = 32
    slot_dim: int = 16
    num_heads: int = 3
    """The workspaces are those of ait_tiny."""
    threads: int | None = None
    """CPU threads; torch's choice by default."""


# What may differ between the sittings of one experiment, since it changes no number.
FREE_TO_DIFFER = ("data_dir", "out", "table", "arms", "seeds", "threads")


@dataclass(frozen=True)
class Images:
    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset


def transfer(config: Config) -> None:
    """Runs what is not yet in ``config.out``: first the trials, then the runs, seed by seed.

    Raises:
        ValueError: an arm is unknown, or a file in the folder is of another budget.
    """
    unknown = [arm for arm in config.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"transfer: expected arms among {', '.join(ARMS)}, got {', '.join(unknown)}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    images = load(config)
    config.out.mkdir(parents=True, exist_ok=True)
    for arm in config.arms:
        for lr in config.lrs:
            once(config, f"trial-{arm}-{lr:g}", lambda arm=arm, lr=lr: run(config, images, arm, 0, lr, is_trial=True))
    for seed in config.seeds:
        for arm in config.arms:
            lr = chosen_lr(config, arm)
            once(config, f"{arm}-{seed}", lambda arm=arm, seed=seed, lr=lr: run(config, images, arm, seed, lr))


def once(config: Config, name: str, compute: Any) -> None:
    """Writes ``compute()`` under ``name``, unless it is there."""
    path = config.out / f"{name}.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["config"]
        if before != recorded(config):
            raise ValueError(f"transfer: expected the budget of {path.name}, {before}, got {recorded(config)}")
        return
    revision = git_revision()  # now: the checkout may move on meanwhile
    write_json(path, {"run": name, **compute(), "config": recorded(config), "git_revision": revision})


def recorded(config: Config) -> dict[str, Any]:
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_TO_DIFFER}
    return json.loads(json.dumps(values))  # tuples become lists, as they do in the file


def load(config: Config) -> Images:
    splits = load_images("cifar100", config.data_dir)
    parts = []
    for name, count in (
        ("train", config.train_images),
        ("validation", config.validation_images),
        ("test", config.test_images),
    ):
        part = getattr(splits, name)
        parts.append(part.subset(stratified_choice(part.labels, count, seed=0)))
    return Images(*parts)


def make_model(config: Config, arm: str, seed: int) -> nn.Module:
    """The model of an arm; the classifier's first weights are the same in all."""
    torch.manual_seed(seed)
    model = ait.create_model("vit_tiny", pretrained="cifar10", num_classes=100)
    if "workspace" in arm:
        sizes = {"num_slots": config.num_slots, "slot_dim": config.slot_dim, "num_heads": config.num_heads}
        ait.insert_workspace(model, **sizes)
    trained: nn.Module = model
    if "lora" in arm:
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=["attn.qkv", "attn.proj"])
        trained = get_peft_model(model, lora)
    if "workspace" in arm:
        ait.freeze_backbone(trained)
    else:
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.head.requires_grad_(True)
    return trained


def run(config: Config, images: Images, arm: str, seed: int, lr: float, is_trial: bool = False) -> dict[str, Any]:
    """Trains one arm; what its JSON file holds. A trial lasts one epoch and leaves the test set alone."""
    epochs = 1 if is_trial else config.epochs
    model = make_model(config, arm, seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=lr)
    steps_per_epoch = len(images.train) // config.batch_size
    steps = epochs * steps_per_epoch
    schedule = Schedule(steps, round(config.warmup * steps), lr, config.final_lr_ratio)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(seed)  # order of the images and augmentation
    start, loss_sum = time.perf_counter(), 0.0
    model.train()
    for step, (pixels, labels) in enumerate(
        tqdm(batches(config, images.train, epochs, generator), f"{arm} {lr:g}", steps)
    ):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        loss = F.cross_entropy(model(pixels), labels)
        loss_sum += loss.item()
        if "workspace" in arm:
            loss = loss + ait.balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, config.clip_norm)
        optimizer.step()
    seconds = time.perf_counter() - start
    correct = int(answers_right(model, images.validation, pretrained_normalize).sum())
    result: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "lr": lr,
        "is_trial": is_trial,
        "trained_parameters": count_trained(model),
        "train_loss": loss_sum / steps,
        "validation_accuracy": correct / len(images.validation),
        "validation_images": len(images.validation),
    }
    if not is_trial:
        correct = int(answers_right(model, images.test, pretrained_normalize).sum())
        result |= {
            "test_correct": correct,
            "test_images": len(images.test),
            "test_accuracy": correct / len(images.test),
            "test_interval_95": wilson_interval(correct, len(images.test)),
        }
    return result | {
        "images_per_second": steps * config.batch_size / seconds,
        "seconds": seconds,
        "environment": environment(),
    }


def batches(
    config: Config, images: ImageDataset, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches of all epochs, as a model takes them."""
    for _ in range(epochs):
        for pixels, labels in images.batches(config.batch_size, generator=generator, drop_last=True):
            augmented = random_horizontal_flip(random_crop(pixels, 4, generator), generator)
            yield pretrained_normalize(augmented), labels


def pretrained_normalize(pixels: Tensor) -> Tensor:
    """As the pretrained weights saw their images."""
    weights = ait.pretrained_config("vit_tiny.cifar10")
    return normalize(pixels, weights.mean, weights.std)


def count_trained(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by kind."""
    counts = {"head": 0, "lora": 0, "workspace": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if "lora_" in name else "workspace" if "global_workspace" in name else "head"
            counts[kind] += parameter.numel()
    return counts


def read(config: Config, is_trial: bool) -> list[dict[str, Any]]:
    """What the folder holds of trials, or of runs."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(config.out.glob("*.json"))]
    return [each for each in files if each["is_trial"] == is_trial]


def chosen_lr(config: Config, arm: str) -> float:
    """The learning rate of the trial with the best validation accuracy; of equal ones the lower."""
    trials = [each for each in read(config, is_trial=True) if each["arm"] == arm and each["lr"] in config.lrs]
    return min(trials, key=lambda each: (-each["validation_accuracy"], each["lr"]))["lr"]


def table(trials: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line an arm, a line a run, and the trials."""
    lines = [
        "| arm | trained parameters | besides the head | learning rate | test %, mean | range over seeds | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in ARMS:
        mine = [each for each in runs if each["arm"] == arm]
        if mine:
            counts, accuracies = mine[0]["trained_parameters"], [100 * each["test_accuracy"] for each in mine]
            total, mean = sum(counts.values()), sum(accuracies) / len(accuracies)
            lines.append(
                f"| {arm} | {total:,} | {total - counts['head']:,} | {mine[0]['lr']:g} | "
                f"{mean:.2f} | {min(accuracies):.2f} to {max(accuracies):.2f} | {len(mine)} |"
            )
    lines += ["", "| run | test % | 95 % interval | validation % | images/s | minutes |", "|---|--:|--:|--:|--:|--:|"]
    for arm in ARMS:
        for each in (each for each in runs if each["arm"] == arm):
            low, high = each["test_interval_95"]
            lines.append(
                f"| {each['run']} | {100 * each['test_accuracy']:.2f} | {100 * low:.2f} to {100 * high:.2f} | "
                f"{100 * each['validation_accuracy']:.2f} | {each['images_per_second']:.0f} | "
                f"{each['seconds'] / 60:.1f} |"
            )
    lrs = sorted({each["lr"] for each in trials})
    lines += ["", "| validation %, trials | " + " | ".join(f"{lr:g}" for lr in lrs) + " |", "|---|" + "--:|" * len(lrs)]
    for arm in ARMS:
        by_lr = {each["lr"]: f"{100 * each['validation_accuracy']:.2f}" for each in trials if each["arm"] == arm}
        if by_lr:
            lines.append(f"| {arm} | " + " | ".join(by_lr.get(lr, "") for lr in lrs) + " |")
    return "\n".join([*lines, "", *comparisons(runs)])


def comparisons(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of every two arms: whether all seeds of one are above all seeds of the other, and by more than the intervals."""
    lines = []
    for index, first in enumerate(ARMS):
        for second in ARMS[index + 1 :]:
            a, b = ([each for each in runs if each["arm"] == arm] for arm in (first, second))
            if not a or not b:
                continue
            apart = not any(intervals_overlap(x["test_interval_95"], y["test_interval_95"]) for x in a for y in b)
            means = [sum(each["test_accuracy"] for each in part) / len(part) for part in (a, b)]
            better, worse = (first, second) if means[0] > means[1] else (second, first)
            lines.append(
                f"- {better} is better than {worse} (no interval of the one overlaps one of the other)"
                if apart
                else f"- {first} and {second}: no difference shown (intervals overlap)"
            )
    return lines


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        if not config.table:
            transfer(config)
        print(table(read(config, is_trial=True), read(config, is_trial=False)))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
