"""Models that are saved to folders and loaded again: the same arguments, the same tensors, and no code that runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ait
from ait.models import AssociativeTransformer, TransformerShell, VisionTransformer
from ait.models.registry import _options
from ait.models.sharing import config_of

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

SMALL = {"depth": 1, "embed_dim": 16, "head_dim": 8, "img_size": 8, "num_slots": 4, "slot_dim": 4, "workspace_heads": 2}
SMALL_VIT = {"depth": 1, "embed_dim": 16, "head_dim": 8, "img_size": 8}
# A value other than the default for every option that a model has.
OPTIONS: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 24,
    "head_dim": 4,
    "hidden_dim": 20,
    "attention": False,
    "num_slots": 5,
    "slot_dim": 3,
    "workspace_heads": 1,
    "top_k": 7,
    "top_k_ratio": 0.25,
    "memory": "learned",
    "semantics": "released",
    "reader": "attention",
    "alpha": 0.3,
    "beta": np.float64(2.5),
    "steps": np.int64(3),
    "tol": 1e-3,
    "balance_weight": 0.0,
    "write_dropout": 0.25,
    "selection_dtype": torch.bfloat16,
    "dtype": torch.float64,
    "img_size": (8, 12),
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 0,
    "question_dim": 5,
}


def make(**options: Any) -> AssociativeTransformer:
    return AssociativeTransformer(**{**SMALL, **options})


def run(model: TransformerShell) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    images = torch.randn(3, model.patch_embed.in_chans, *model.patch_embed.img_size, generator=generator).to(dtype)
    question = None if model.question_dim is None else torch.ones(3, model.question_dim, dtype=dtype)
    with torch.no_grad():
        return model(images, question)


def assert_same(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert str(loaded) == str(model)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_every_option_is_tried() -> None:
    assert set(OPTIONS) == (_options(AssociativeTransformer) | _options(VisionTransformer)) - {"device"}


@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_each_option_comes_back(tmp_path: Path, option: str | None) -> None:
    torch.manual_seed(3)
    model = make(**({} if option is None else {option: OPTIONS[option]}))
    run(model)
    loaded = AssociativeTransformer.from_pretrained(save(model, tmp_path))
    assert not loaded.training and model.training
    assert_same(loaded, model.eval())
    assert config_of(loaded) == config_of(model)
    assert torch.equal(run(loaded), run(model))
    arguments = json.loads((tmp_path / "config.json").read_text())["arguments"]
    assert set(arguments) == set(OPTIONS), "defaults are recorded, too"
    if option is not None and not isinstance(OPTIONS[option], (tuple, torch.dtype)):
        assert arguments[option] == OPTIONS[option]


@pytest.mark.parametrize("options", [{}, {"attention": False}, {"question_dim": 3, "dtype": torch.bfloat16}])
def test_a_vision_transformer_comes_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model = VisionTransformer(**{**SMALL_VIT, **options})
    loaded = VisionTransformer.from_pretrained(save(model, tmp_path))
    assert_same(loaded, model.eval())
    assert torch.equal(run(loaded), run(model))


def test_the_shell_s_loader_finds_the_class(tmp_path: Path) -> None:
    for model in (make(), VisionTransformer(**SMALL_VIT)):
        loaded = TransformerShell.from_pretrained(save(model, tmp_path / type(model).__name__))
        assert type(loaded) is type(model)


def test_what_training_did_to_memories_is_saved_and_evaluation_goes_on_from_it(tmp_path: Path) -> None:
    model = make(semantics="released")
    for _ in range(3):
        run(model)
    memory = model.blocks[0].mlp.workspace.memory
    memory.skipped_updates.fill_(2)
    loaded = AssociativeTransformer.from_pretrained(save(model, tmp_path))
    assert loaded.blocks[0].mlp.workspace.memory.skipped_updates == 2
    model.eval()
    for _ in range(2):
        assert torch.equal(run(loaded), run(model)), "the released memory moves in evaluation, alike in both"


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "reset_classifier", "mixed"])
def test_what_changed_after_construction_is_saved_as_it_is(tmp_path: Path, change: str) -> None:
    model = make(memory="learned" if change == "bfloat16" else "ewma")
    if change == "reset_classifier":
        model.reset_classifier(3)
    elif change == "mixed":
        model.bfloat16()
        model.head.float()
    else:
        getattr(model, change)()
    loaded = AssociativeTransformer.from_pretrained(save(model, tmp_path))
    if change == "mixed":
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), "the wider dtype rounds nothing"
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    else:
        assert_same(loaded, model.eval())


def test_tensors_that_share_storage_or_are_views_are_saved(tmp_path: Path) -> None:
    model = make(depth=2)
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1
    weight = model.blocks[0].mlp.fc2.weight
    model.blocks[0].mlp.fc2.weight = torch.nn.Parameter(torch.randn(*weight.shape[::-1]).T)
    model.head.weight = torch.nn.Parameter(torch.randn(100, model.head.in_features)[:10])
    loaded = AssociativeTransformer.from_pretrained(save(model, tmp_path))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (tmp_path / "model.safetensors").stat().st_size < 1.3 * sum(t.nbytes for t in model.state_dict().values())


def test_overrides_take_the_place_of_what_was_saved(tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path)
    loaded = AssociativeTransformer.from_pretrained(tmp_path, beta=3.0, top_k=2, dtype=torch.float64)
    workspace = loaded.blocks[0].mlp.workspace
    assert (workspace.reader.beta, workspace.top_k, loaded.head.weight.dtype) == (3.0, 2, torch.float64)
    torch.testing.assert_close(loaded.head.weight.float(), model.head.weight)

    fresh = AssociativeTransformer.from_pretrained(tmp_path, num_classes=3)
    assert fresh.head.out_features == 3
    for name, tensor in fresh.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, model.state_dict()[name]), name
    assert torch.equal(AssociativeTransformer.from_pretrained(tmp_path, num_classes=10).head.weight, model.head.weight)
    headless = AssociativeTransformer.from_pretrained(tmp_path, num_classes=0)
    assert run(headless).shape == (3, 4 * 16)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter.*:UserWarning")
def test_map_location_is_the_device_of_the_model(tmp_path: Path) -> None:
    save(make(), tmp_path)
    for device in ("cpu", torch.device("meta")):
        loaded = AssociativeTransformer.from_pretrained(tmp_path, map_location=device)
        assert {tensor.device for tensor in loaded.state_dict().values()} == {torch.device(device)}


def test_a_subclass_with_arguments_of_its_own_comes_back(tmp_path: Path) -> None:
    class Wide(AssociativeTransformer):
        def __init__(self, times: int, *, extra: float = 0.5, **options: Any) -> None:
            super().__init__(embed_dim=16 * times, num_slots=4, slot_dim=4, workspace_heads=2, depth=1, **options)
            self.times, self.extra = times, extra

    model = Wide(2, head_dim=8, img_size=8)
    save(model, tmp_path)
    loaded = Wide.from_pretrained(tmp_path)
    assert (type(loaded), loaded.times, loaded.extra) == (Wide, 2, 0.5)
    assert_same(loaded, model.eval())
    with pytest.raises(ValueError, match="expected the config of a model of VisionTransformer, got one of Wide"):
        VisionTransformer.from_pretrained(tmp_path)


def test_copies_and_compiled_models_are_saved_like_the_original(tmp_path: Path) -> None:
    import copy
    import pickle

    model = make(alpha=0.4)
    for i, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model))):
        folder = save(other, tmp_path / str(i))
        assert_same(AssociativeTransformer.from_pretrained(folder), model.eval())


@pytest.mark.parametrize("change", ["head", "insert", "remove", "meta"])
def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path: Path, change: str) -> None:
    model = make(device="meta" if change == "meta" else None)
    if change == "head":
        model.head = torch.nn.Linear(64, 3)
    elif change == "insert":
        model.blocks[0].gate = torch.nn.Parameter(torch.zeros(()))
    elif change == "remove":
        model.blocks[0].attn.proj.bias = None
    message = {
        "head": r"expected the tensors that its arguments make, got 2 differences: head.weight is \(3, 64\)",
        "insert": "the model lacks blocks.0.gate",
        "remove": "the weights lack blocks.0.attn.proj.bias",
        "meta": "expected a model with storage",
    }[change]
    save(make(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_shell_that_was_made_with_a_function_is_not_saved(tmp_path: Path) -> None:
    model = TransformerShell(lambda tokens: torch.nn.Identity(), depth=1, embed_dim=8, img_size=8)
    with pytest.raises(ValueError, match="expected make_block to be a number, string, dtype"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What is wrong in a folder, and what is said about it.


def edit_config(folder: Path, **arguments: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["arguments"] |= arguments
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], FileNotFoundError, "got no files"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "expected config.json and model.safe"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "got README.md, config.json"),
    "config no JSON": (
        lambda f: (f / "config.json").write_text("{'a': 1}"),
        ValueError,
        r"config\.json: expected JSON",
    ),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ValueError, "expected JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), ValueError, "expected a JSON object, got '\\[1"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 200_000), ValueError, "expected JSON"),
    "config of another library": (
        lambda f: (f / "config.json").write_text('{"model_type": "vit", "hidden_size": 768}'),
        ValueError,
        "expected a config with 'architecture' and 'arguments', got hidden_size, model_type",
    ),
    "config of timm": (
        lambda f: (f / "config.json").write_text('{"architecture": "ait_tiny_patch4_32", "pretrained_cfg": {}}'),
        ValueError,
        "as timm saves it: import ait.integrations.timm_models and load it with timm.create_model",
    ),
    "class of timm's registry": (
        lambda f: (f / "config.json").write_text('{"architecture": "TimmVisionTransformer", "arguments": {}}'),
        ValueError,
        "got one of TimmVisionTransformer; import ait.integrations.timm_models, where that class is",
    ),
    "unknown argument": (lambda f: edit_config(f, num_slot=4), TypeError, "refuses the arguments.*num_slot"),
    "refused argument": (lambda f: edit_config(f, alpha=7), ValueError, "refuses the arguments of the config: .*alpha"),
    "other sizes": (
        lambda f: edit_config(f, hidden_dim=8),
        ValueError,
        r"the weights do not fit the config: 3 differences: blocks.0.mlp.fc1.weight is \(64, 16\) in the weights and "
        r"\(8, 16\) in the model",
    ),
    "more blocks": (lambda f: edit_config(f, depth=2), ValueError, "the weights lack blocks.1.norm1.weight"),
    "a billion blocks": (lambda f: edit_config(f, depth=10**9), ValueError, "expected tensors for each of 1000000000"),
    "too wide for memory": (lambda f: edit_config(f, embed_dim=2**24), ValueError, "do not fit the config"),
    "a tensor less": (lambda f: edit_weights(f, {"head.bias": None}), ValueError, "the weights lack head.bias"),
    "a tensor more": (lambda f: edit_weights(f, {"new": torch.ones(1)}), ValueError, "the model lacks new"),
    "weights cut": (lambda f: cut(f, -9), ValueError, "expected a safetensors file, got one that is truncated"),
    "header cut": (lambda f: cut(f, 50), ValueError, "expected a safetensors file, got one that is truncated"),
    "weights empty": (lambda f: cut(f, 0), ValueError, "expected a safetensors file, got an empty file"),
    "weights a page": (
        lambda f: (f / "model.safetensors").write_text("<!doctype html>"),
        ValueError,
        "got an HTML or XML page",
    ),
    "weights a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ValueError,
        "got a Git LFS pointer",
    ),
    "weights a pickle": (
        lambda f: torch.save({}, f / "model.safetensors"),
        ValueError,
        "expected a safetensors file, got a zip archive, as torch.save writes",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_folder_is_refused_with_the_reason(tmp_path: Path, wrong: str) -> None:
    save(make(), tmp_path)
    change, error, message = WRONG[wrong]
    change(tmp_path)
    with pytest.raises(error, match=message):
        AssociativeTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such/folder", FileNotFoundError, "no folder or file no/such/folder, and no repository can"),
        ("/no/such/folder", FileNotFoundError, "no folder or file /no/such/folder"),
        ("missing.safetensors", FileNotFoundError, "no folder or file missing.safetensors"),
        ("", FileNotFoundError, "no folder or file"),
        (b"bytes", ValueError, "expected a folder, a file or a repository, got b'bytes'"),
    ],
)
def test_a_place_that_cannot_be_is_refused(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AssociativeTransformer.from_pretrained(source)


def test_the_config_names_no_code_to_import(tmp_path: Path) -> None:
    save(make(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architecture": "os.system"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected the config of .* TransformerShell, got one of os\.system"):
        TransformerShell.from_pretrained(tmp_path)


def test_not_strict_passes_over_names_with_a_warning_and_never_over_shapes(tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path)
    edit_weights(tmp_path, {"head.bias": None, "new": torch.ones(1)})
    with pytest.warns(UserWarning, match=r"2 differences: the weights lack head\.bias; the model lacks new"):
        loaded = AssociativeTransformer.from_pretrained(tmp_path, strict=False)
    assert torch.equal(loaded.head.weight, model.head.weight)
    edit_weights(tmp_path, {"head.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"head.weight is \(2, 2\) in the weights"):
        AssociativeTransformer.from_pretrained(tmp_path, strict=False)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["value", "top", "key", "legacy"])
def test_a_pickle_is_read_as_tensors_and_its_code_never_runs(tmp_path: Path, where: str) -> None:
    model = make()
    folder, mark = save(model, tmp_path / "model"), tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    pickled = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), pickled)
    assert_same(AssociativeTransformer.from_pretrained(folder), model.eval())

    payload = Payload(mark)
    content: Any = {"value": model.state_dict() | {"x": payload}, "top": payload, "key": {payload: torch.ones(1)}}
    content = content.get(where, {"x": payload})
    torch.save(content, pickled, _use_new_zipfile_serialization=where != "legacy")
    with pytest.raises(ValueError, match=r"refers to posix\.system, which was not executed\. .*weights_only=False"):
        AssociativeTransformer.from_pretrained(folder)
    assert not mark.exists()
    torch.load(pickled, weights_only=False)
    assert mark.exists(), "the payload works"


@pytest.mark.parametrize("content", ["module", "list", "numbers", "junk", "cut", "empty"])
def test_another_pickle_is_refused_with_the_reason(tmp_path: Path, content: str) -> None:
    folder = save(make(), tmp_path)
    (folder / "model.safetensors").unlink()
    pickled = folder / "pytorch_model.bin"
    objects = {"module": torch.nn.Linear(1, 1), "list": [torch.ones(1)], "numbers": {"epoch": 1}}
    torch.save(objects.get(content, {"weight": torch.ones(99)}), pickled)
    whole = pickled.read_bytes()
    broken = {"junk": b"no checkpoint at all\n", "cut": whole[:-70], "empty": b""}
    pickled.write_bytes(broken.get(content, whole))
    message = {
        "module": r"refers to torch.nn.modules.linear.Linear, which was not executed",
        "list": "expected a state dict, names and tensors, got list",
        "numbers": "expected a state dict, names and tensors, got dict",
        "junk": "tensors alone, got one that is truncated or altered",
        "cut": "tensors alone, got one that is truncated or altered",
        "empty": "tensors alone, got an empty file",
    }[content]
    with pytest.raises(ValueError, match=message):
        AssociativeTransformer.from_pretrained(folder)


@pytest.mark.parametrize("failing", ["writing", "renaming"])
def test_saving_replaces_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    import safetensors.torch

    save(make(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(first: object, path: Path, metadata: object = None) -> None:
        if failing == "writing":
            path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(*((safetensors.torch, "save_file") if failing == "writing" else (os, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        make().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_weights_can_be_read_by_whom_the_config_can_be_read(tmp_path: Path) -> None:
    save(make(), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


# create_model


def test_create_model_takes_a_folder_or_a_file_of_a_model_of_its_name(tmp_path: Path) -> None:
    model = ait.create_model("ait_tiny", img_size=8, patch_size=2, in_chans=1, num_classes=4, beta=2.0)
    save(model, tmp_path / "saved")
    for place in (tmp_path / "saved", str(tmp_path / "saved"), tmp_path / "saved" / "model.safetensors"):
        loaded = ait.create_model("ait_tiny", pretrained=place)
        assert loaded.training
        assert_same(loaded, model)
    other = ait.create_model("ait_tiny", pretrained=tmp_path / "saved", num_classes=7, beta=1.0)
    assert other.head.out_features == 7 and other.blocks[0].mlp.workspace.reader.beta == 1.0
    assert torch.equal(other.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_create_model_refuses_a_saved_model_of_another_name(tmp_path: Path) -> None:
    save(ait.create_model("ait_tiny", depth=2, img_size=8), tmp_path)
    with pytest.raises(ValueError, match=r"does not hold ait_tiny: it has depth=2 for 3; Associative.*from_pretrained"):
        ait.create_model("ait_tiny", pretrained=tmp_path)
    with pytest.raises(ValueError, match="does not hold ait_small: it has embed_dim=128 for 768"):
        ait.create_model("ait_small", pretrained=tmp_path)
    with pytest.raises(ValueError, match=r"vit_tiny is of VisionTransformer, and .* holds one of AssociativeTransf"):
        ait.create_model("vit_tiny", pretrained=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        ait.create_model("ait_tiny", pretrained="./nothing/here")
    with pytest.raises(ValueError, match="has no pretrained weights 'mnist'"):
        ait.create_model("ait_tiny", pretrained="mnist")


def test_a_safetensors_file_without_a_config_is_refused(tmp_path: Path) -> None:
    save(make(), tmp_path)
    edit_weights(tmp_path, {})
    with pytest.raises(ValueError, match="expected a config in the header, got none"):
        AssociativeTransformer.from_pretrained(tmp_path / "model.safetensors")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: expected a .safetensors file .*ait.convert"):
        AssociativeTransformer.from_pretrained(tmp_path / "model.pth")
