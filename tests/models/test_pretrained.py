"""Shipped weights: they load, they are what was trained, and nothing that does not fit is loaded."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

import ait
from ait.models import pretrained

pytest.importorskip("safetensors")

NAMES = ["ait_tiny.cifar10", "vit_tiny.cifar10"]
WEIGHTS = Path(str(resources.files("ait.models"))) / "weights"


def _make(name: str, **options: Any) -> torch.nn.Module:
    model, tag = name.split(".")
    return ait.create_model(model, pretrained=tag, **options)


def test_the_weights_are_listed_and_small() -> None:
    assert ait.list_pretrained() == NAMES
    files = {path.stem.replace("-", "."): path.stat().st_size for path in WEIGHTS.glob("*.safetensors")}
    assert sorted(files) == NAMES and max(files.values()) < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_file_s(name: str) -> None:
    import safetensors.torch

    stored = safetensors.torch.load_file(WEIGHTS / f"{name.replace('.', '-')}.safetensors")
    model = _make(name)
    state = model.state_dict()
    assert state.keys() == stored.keys() and model.training
    for key, tensor in state.items():
        assert torch.equal(tensor, stored[key].to(tensor.dtype)), key
        if tensor.is_floating_point():
            memory = key.endswith("memory.gamma")
            assert (tensor.dtype, stored[key].dtype) == (torch.float32, torch.float32 if memory else torch.float16)
    memories = [tensor for key, tensor in state.items() if key.endswith("memory.gamma")]
    assert len(memories) == (3 if name.startswith("ait") else 0)
    for gamma in memories:
        torch.testing.assert_close(gamma.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("name", NAMES)
def test_the_config_says_how_to_use_them(name: str) -> None:
    config = ait.pretrained_config(name)
    assert (config.name, config.model, config.data) == (name, name.split(".")[0], "cifar10")
    assert dict(config.model_arguments) == {"img_size": (32, 32), "patch_size": 4, "in_chans": 3, "num_classes": 10}
    assert config.mean == (0.4914, 0.4822, 0.4465) and config.std == (0.2023, 0.1994, 0.2010)
    assert len(config.classes) == 10 and config.classes[0] == "airplane"
    assert config.test_images == 10_000 and 0.74 < config.test_accuracy < 0.76
    assert len(config.git_revision) == 40 and config.epochs == 10
    low, high = config.test_interval_95
    assert low < config.test_accuracy < high
    assert config.parameters == ait.count_parameters(_make(name)).parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_card_states_the_accuracy_of_the_file(name: str) -> None:
    card = (WEIGHTS / "README.md").read_text()
    config = ait.pretrained_config(name)
    assert f"| `{name}` | {100 * config.test_accuracy:.2f} |" in card


def test_trained_weights_answer_with_certainty_and_the_same_whatever_the_neighbours() -> None:
    model = _make(NAMES[0]).eval()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-4, atol=1e-4)
        fresh = ait.create_model("ait_tiny").eval()(images)
    assert logits.isfinite().all() and logits.std() > 2 * fresh.std()


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_classes_gets_a_fresh_head(name: str) -> None:
    torch.manual_seed(0)
    model, whole = _make(name, num_classes=7), _make(name)
    assert model.head.out_features == 7
    for key, tensor in whole.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(model.state_dict()[key], tensor), key
    headless = _make(name, num_classes=0)
    assert headless(torch.zeros(2, 3, 32, 32)).shape == (2, 64 * 128)


def test_dtype_is_respected() -> None:
    model = _make("ait_tiny.cifar10", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("gamma")} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ait_tiny.cifar10", {"patch_size": 8}, r"do not fit this model, which has .* differences: .*patch_embed"),
        ("ait_tiny.cifar10", {"img_size": 64}, r"head_norm.weight is \(8192,\) in the weights and \(32768,\)"),
        ("ait_tiny.cifar10", {"num_slots": 64}, r"memory.gamma is \(32, 16\) in the weights and \(64, 16\)"),
        ("ait_tiny.cifar10", {"memory": "fixed"}, r"the model lacks blocks.0.mlp.workspace.writer"),
        ("vit_tiny.cifar10", {"depth": 4}, r"the weights lack blocks.3"),
        ("vit_tiny.mnist", {}, "vit_tiny has no pretrained weights 'mnist'; there are ait_tiny.cifar10, vit_tiny"),
        ("ait_base.cifar10", {}, "ait_base has no pretrained weights 'cifar10'; there are ait_tiny.cifar10, vit_tiny"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _make(name, **options)


def test_a_refused_model_is_left_as_it_was() -> None:
    model = ait.create_model("ait_tiny", num_slots=64)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit this model"):
        pretrained.load_pretrained(model, "ait_tiny.cifar10")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_an_altered_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    content = bytearray((WEIGHTS / "ait_tiny-cifar10.safetensors").read_bytes())
    folder = tmp_path / "weights"
    folder.mkdir()
    if change == "flip":
        content[-1] ^= 1
    if change != "remove":
        (folder / "ait_tiny-cifar10.safetensors").write_bytes(content[:-7] if change == "cut" else content)
    monkeypatch.setattr(pretrained, "WEIGHTS_DIR", folder)
    error, message = (FileNotFoundError, "no file") if change == "remove" else (ValueError, "truncated or altered")
    with pytest.raises(error, match=message):
        _make("ait_tiny.cifar10")


def test_a_file_of_unknown_checksum_must_be_whole(tmp_path: Path) -> None:
    whole = (WEIGHTS / "ait_tiny-cifar10.safetensors").read_bytes()
    path = tmp_path / "other.safetensors"
    path.write_bytes(whole)
    config, tensors = pretrained.read_weights(path)
    assert config == ait.pretrained_config("ait_tiny.cifar10") and tensors
    for content in (b"", b"no weights at all", whole[:-9], whole[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.safetensors: expected a"):
            pretrained.read_weights(path)


def test_without_safetensors_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'associative-transformer\[pretrained\]'"):
        _make("ait_tiny.cifar10")
    assert ait.create_model("ait_tiny") is not None
