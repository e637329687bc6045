"""``python -m ait.convert``: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ait
from ait.convert.__main__ import main
from ait.models import AssociativeTransformer
from tests.released_model import released_forward, released_state_dict
from tests.tolerances import assert_close

pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[1]
FLAGS = ["--head-dim", "8", "--top-k", "5", "--beta", "0.5"]
TINY = {"depth": 3, "width": 128, "hidden": 512, "slots": 32, "slot_dim": 16, "heads": 3, "patch": 4, "side": 2}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(released_state_dict(), tmp_path / "released.pth")
    return tmp_path / "released.pth"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def assert_is_the_release(model: AssociativeTransformer) -> None:
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    assert_close(model(images), released_forward(released_state_dict(), images, head_dim=8, k=5, beta=0.5))


def test_a_file_is_written_that_loads_and_answers_as_the_release(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = checkpoint.parent / "out.safetensors"
    assert run(checkpoint, output, *FLAGS) == 0
    assert_is_the_release(AssociativeTransformer.from_pretrained(output))
    said = capsys.readouterr()
    assert not said.err
    for expected in (
        f"{checkpoint}: an AiT of 2 blocks 24 wide, 6 slots 4 wide and 2 heads a block; images of 6 x 6 pixels, "
        "patches of 2, 5 classes",
        "  dropped: 4 tensors, 58,632 entries",
        "    cls_token (1, 1, 24)",
        "    to_patch_embedding_cnn.0.weight (768, 3, 5, 5)",
        "  not in the checkpoint: in_chans=3, head_dim=8, top_k=5, beta=0.5, write_dropout=0.1",
        f"{output}: ait.AssociativeTransformer.from_pretrained('{output}') loads it",
    ):
        assert expected in said.out.splitlines(), said.out


def test_a_folder_is_written_that_can_be_shared(checkpoint: Path) -> None:
    pytest.importorskip("huggingface_hub")
    output = checkpoint.parent / "folder"
    assert run(checkpoint, output, *FLAGS) == 0
    assert sorted(file.name for file in output.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_is_the_release(AssociativeTransformer.from_pretrained(output))
    assert sorted(file.name for file in checkpoint.parent.iterdir()) == ["folder", "released.pth"]


def test_the_command_runs_as_a_module(checkpoint: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "ait.convert", *map(str, arguments)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)

    output = checkpoint.parent / "out.safetensors"
    done = command(checkpoint, output, *FLAGS)
    assert (done.returncode, done.stderr) == (0, "") and output.exists()
    refused = command(checkpoint, output, *FLAGS)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr == f"ait.convert: output {output} exists; --overwrite replaces it\n"


def test_help_tells_every_option_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("--help")
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    options = ("--model", "--img-size", "--in-chans", "--head-dim", "--top-k", "--beta", "--ignore-unknown")
    for expected in ("python -m ait.convert", *options, "--overwrite", "exit status: 0 converted; 1", "example:"):
        assert expected in said


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["released.pth"],
        ["released.pth", "out.safetensors", "third"],
        ["released.pth", "out.safetensors", "--model", "vit_small"],
        ["released.pth", "out.safetensors", "--top-k", "0"],
        ["released.pth", "out.safetensors", "--img-size", "wide"],
        ["released.pth", "out.safetensors", "--force"],
    ],
)
def test_wrong_usage_exits_with_2_and_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    assert "usage: python -m ait.convert" in capsys.readouterr().err


def test_the_model_s_name_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(released_state_dict(dtype=torch.float32, **TINY), tmp_path / "tiny.pth")
    flags = ["--head-dim", "32"]
    assert run(tmp_path / "tiny.pth", tmp_path / "small.safetensors", "--model", "ait_small", *flags) == 1
    assert "expected ait_small, got an AiT of 3 blocks 128 wide" in capsys.readouterr().err
    assert not (tmp_path / "small.safetensors").exists()
    assert run(tmp_path / "tiny.pth", tmp_path / "tiny.safetensors", "--model", "ait_tiny", *flags) == 0
    assert ait.create_model("ait_tiny", pretrained=tmp_path / "tiny.safetensors").num_classes == 5


def test_an_output_that_exists_is_replaced_on_request_alone(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = checkpoint.parent / "out.safetensors"
    output.write_text("mine")
    assert run(checkpoint, output, *FLAGS) == 1
    assert "exists; --overwrite replaces it" in capsys.readouterr().err and output.read_text() == "mine"
    assert run(checkpoint, output, *FLAGS, "--overwrite") == 0
    assert_is_the_release(AssociativeTransformer.from_pretrained(output))


def test_a_folder_that_is_not_empty_is_added_to_on_request_alone(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub")
    output = checkpoint.parent / "folder"
    output.mkdir()
    assert run(checkpoint, output, *FLAGS) == 0
    (output / "notes.txt").write_text("mine")
    assert run(checkpoint, output, *FLAGS) == 1
    assert "exists" in capsys.readouterr().err
    assert run(checkpoint, output, *FLAGS, "--overwrite") == 0
    assert (output / "notes.txt").read_text() == "mine"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def write_payload(path: Path) -> None:
    torch.save({"state_dict": released_state_dict(), "args": Payload(path.parent / "executed")}, path)


def convert_first(path: Path) -> None:
    assert run(path, path.with_name("first.safetensors"), *FLAGS) == 0
    path.with_name("first.safetensors").rename(path.with_suffix(".safetensors"))


def replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What is done to the checkpoint, the name under which it is given, and what is said.
WRONG: dict[str, tuple[Any, str, str]] = {
    "missing": (lambda p: p.unlink(), "released.pth", "no file {path}"),
    "a folder": (become_folder, "released.pth", "expected a file, got a folder"),
    "empty": (lambda p: replace(p, b""), "released.pth", "tensors alone, got an empty file"),
    "text": (lambda p: replace(p, b"hello\n"), "released.pth", "got one that is truncated or altered"),
    "an HTML page": (lambda p: replace(p, b"<html>404</html>"), "released.pth", "got an HTML or XML page"),
    "a Git LFS pointer": (lambda p: replace(p, b"version https://git-lfs.github.com/"), "released.pth", "a Git LFS po"),
    "gzipped": (lambda p: replace(p, b"\x1f\x8b\x08\x00"), "released.pth", "got a gzip archive"),
    "truncated": (lambda p: replace(p, p.read_bytes()[:-100]), "released.pth", "got one that is truncated or altered"),
    "half": (lambda p: replace(p, p.read_bytes()[:2000]), "released.pth", "got one that is truncated or altered"),
    "a payload": (write_payload, "released.pth", "refers to posix.system, which was not executed"),
    "a module": (lambda p: torch.save(torch.nn.ReLU(), p), "released.pth", "refers to torch.nn.modules.activation.Re"),
    "one tensor": (lambda p: torch.save(torch.ones(1), p), "released.pth", "{path}: convert_released: expected a st"),
    "an optimiser": (lambda p: torch.save({"state": {}, "param_groups": []}, p), "released.pth", "an optimiser"),
    "our own weights": (
        lambda p: torch.save(ait.create_model("vit_tiny", depth=1, img_size=8).state_dict(), p),
        "released.pth",
        "expected names such as transformer.layers.0.1.fn.fc1.weight, got patch_embed",
    ),
    "our own file": (convert_first, "released.safetensors", "expected a checkpoint of the release, got a file of this"),
    "a wrong suffix": (lambda p: p.rename(p.with_suffix(".safetensors")), "released.safetensors", "got a zip archive"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_exits_with_1_one_line_and_no_output(
    checkpoint: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, name, message = WRONG[wrong]
    change(checkpoint)
    capsys.readouterr()
    output = checkpoint.parent / "out.safetensors"
    assert run(checkpoint.parent / name, output, *FLAGS) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("ait.convert: ") and said.err.count("\n") == 1
    assert message.format(path=checkpoint.parent / name) in said.err
    assert not output.exists() and not (checkpoint.parent / "executed").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/such/folder/out.safetensors", "no folder"),
        ("out.pth", "expected a .safetensors file, or a folder"),
        ("released.pth/out.safetensors", "no folder"),
        ("taken", "expected a folder, got the other"),
        ("taken.safetensors", "expected a file, got the other"),
    ],
)
def test_a_wrong_output_exits_with_1_before_the_checkpoint_is_read(
    tmp_path: Path, output: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "taken.safetensors").mkdir()
    (tmp_path / "released.pth").write_text("never read")
    assert run(tmp_path / "released.pth", tmp_path / output) == 1
    assert message in capsys.readouterr().err


def test_the_checkpoint_itself_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "released.safetensors"
    save_file(released_state_dict(), path)
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for output in (path, tmp_path / "link.safetensors"):
        assert run(path, output, "--overwrite", *FLAGS) == 1
        assert "expected another file than the checkpoint, got the same" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert run(path, tmp_path / "out.safetensors", *FLAGS) == 0


def test_unknown_tensors_are_named_or_dropped_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(released_state_dict() | {"new.weight": torch.ones(3)}, tmp_path / "released.pth")
    output = tmp_path / "out.safetensors"
    assert run(tmp_path / "released.pth", output, *FLAGS) == 1
    assert "also new.weight; ignore_unknown=True (--ignore-unknown) drops them" in capsys.readouterr().err
    assert run(tmp_path / "released.pth", output, *FLAGS, "--ignore-unknown") == 0
    assert "    new.weight (3,)" in capsys.readouterr().out.splitlines()


def test_the_config_stands_in_the_header(checkpoint: Path) -> None:
    from safetensors import safe_open

    output = checkpoint.parent / "out.safetensors"
    assert run(checkpoint, output, *FLAGS, "--img-size", "2", "18") == 0
    with safe_open(output, framework="pt") as file:
        config = json.loads(file.metadata()["ait_config"])
    assert config["architecture"] == "AssociativeTransformer"
    arguments = config["arguments"]
    assert (arguments["img_size"], arguments["semantics"], arguments["top_k"]) == ([2, 18], "released", 5)
