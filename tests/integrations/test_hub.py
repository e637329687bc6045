"""Uploading and downloading over HTTP, against a server on this machine, and the model card."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ait
from tests.integrations.fake_hub import TOKEN, FakeHub, serve

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

REPO_ID = "somebody/small-workspace"
ROOT = Path(__file__).parents[2]
PRELUDE = """
import json, sys, torch, ait
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

def make(seed, **options):
    torch.manual_seed(seed)
    return ait.create_model("ait_tiny", depth=1, embed_dim=32, head_dim=16, img_size=8, **options).eval()

def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("no error")

images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
load = ait.AssociativeTransformer.from_pretrained
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serve() as hub:
        yield hub


def run(hub: FakeHub, cache: Path, code: str, endpoint: str | None = None) -> None:
    """Runs Python that takes ``hub`` for the Hub: huggingface_hub reads the address once, when it is imported."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": endpoint or hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    source = PRELUDE + f"REPO_ID, TOKEN = {REPO_ID!r}, {TOKEN!r}\n" + textwrap.dedent(code)
    result = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_was_pushed_is_what_is_loaded_at_each_revision_and_from_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    run(
        hub,
        tmp_path,
        """
        first = make(1).push_to_hub(REPO_ID, token=TOKEN, commit_message="first", model_card_kwargs={"license": "mit"})
        second = make(2).push_to_hub(REPO_ID, token=TOKEN, commit_message="second")
        make(3).push_to_hub(REPO_ID, token=TOKEN, branch="trial", commit_message="third")
        first = first.oid
        for revision, seed in {None: 2, "main": 2, first: 1, "trial": 3}.items():
            model = load(REPO_ID, revision=revision)
            assert type(model) is ait.AssociativeTransformer and not model.training
            assert torch.equal(model(images), make(seed)(images)), revision
        assert torch.equal(load(f"hf-hub:{REPO_ID}@trial")(images), make(3)(images))

        same = dict(embed_dim=32, depth=1, head_dim=16)
        model = ait.create_model("ait_tiny", pretrained=f"hf-hub:{REPO_ID}@{first}", **same)
        assert model.training and torch.equal(model.eval()(images), make(1)(images))
        """,
    )
    assert hub.messages == ["first", "second", "third"]
    files = hub.repositories[REPO_ID]["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert f'from_pretrained("{REPO_ID}")' in files["README.md"].decode()

    downloads = len(hub.downloads)
    run(
        hub,
        tmp_path,
        "assert torch.equal(load(REPO_ID, local_files_only=True)(images), make(2)(images))",
        endpoint="http://127.0.0.1:9",
    )
    assert len(hub.downloads) == downloads


def test_what_cannot_be_loaded_says_why(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["somebody/empty"] = {"main": {}}
    hub.commit("somebody/empty", {"README.md": b"nothing here"})
    hub.repositories["somebody/other"] = {"main": {}}
    hub.commit("somebody/other", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"junk"})
    hub.repositories["somebody/no-json"] = {"main": {}}
    hub.commit("somebody/no-json", {"config.json": b"{", "model.safetensors": b"junk"})
    hub.repositories["somebody/no-weights"] = {"main": {}}
    hub.commit("somebody/no-weights", {"config.json": b"{}"})
    run(
        hub,
        tmp_path,
        """
        assert "model.safetensors or pytorch_model.bin, got none" in raised(
            FileNotFoundError, lambda: load("somebody/no-weights"))
        raised(RevisionNotFoundError, lambda: load("somebody/empty", revision="none"))
        assert "expected a repository with config.json, got none" in raised(
            FileNotFoundError, lambda: load("somebody/empty"))
        assert "model.safetensors: expected a safetensors file" in raised(ValueError, lambda: load("somebody/other"))
        assert "expected JSON in config.json" in raised(ValueError, lambda: load("somebody/no-json"))
        raised(RepositoryNotFoundError, lambda: load("nobody/nothing"))
        raised(LocalEntryNotFoundError, lambda: load("nobody/nothing", local_files_only=True))
        assert "hf-hub:somebody/empty" not in raised(
            FileNotFoundError, lambda: ait.create_model("ait_tiny", pretrained="hf-hub:somebody/empty"))
        raised(Exception, lambda: make(1).push_to_hub("somebody/without-a-token", token=False))
        """,
    )


def test_a_malicious_pickle_of_a_repository_does_not_run(hub: FakeHub, tmp_path: Path) -> None:
    executed = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {executed}",)

    torch.save({"head.weight": Payload()}, tmp_path / "payload.bin")
    config = b'{"architecture": "AssociativeTransformer", "arguments": {}}'
    hub.repositories["mallory/model"] = {"main": {}}
    hub.commit("mallory/model", {"config.json": config, "pytorch_model.bin": (tmp_path / "payload.bin").read_bytes()})
    run(
        hub,
        tmp_path,
        """
        assert "refers to posix.system, which was not executed" in raised(ValueError, lambda: load("mallory/model"))
        """,
    )
    assert not executed.exists()
    torch.load(tmp_path / "payload.bin", weights_only=False)
    assert executed.exists(), "the payload works"


def test_the_card_says_what_the_model_is_and_how_it_is_loaded(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = ait.create_model("ait_tiny", depth=1, img_size=8, num_classes=2)
    details = {
        "license": "apache-2.0",
        "dataset": "triangle",
        "metrics": {"accuracy": 0.983},
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "classes": ("scalene", "equilateral"),
        "description": "Trained for the test.",
        "tags": ["toy"],
    }
    model.save_pretrained(tmp_path, repo_id=REPO_ID, model_card_kwargs=details)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == (
        "ait",
        "apache-2.0",
        "image-classification",
    )
    assert {"associative-transformer", "pytorch_model_hub_mixin", "toy"} <= set(data["tags"])
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("triangle", "accuracy", 0.983)
    parameters, entries = ait.count_parameters(model)
    for expected in (
        "# small-workspace",
        f"{parameters:,} parameters and {entries:,} memory entries",
        "Trained for the test.",
        f'ait.AssociativeTransformer.from_pretrained("{REPO_ID}")',
        "torch.zeros(1, 3, 8, 8)",
        "mean (0.5, 0.5, 0.5) and std (0.25, 0.25, 0.25)",
        "scalene, equilateral",
        "| accuracy | 0.983 |",
        "arXiv:2309.12862",
        "@inproceedings{sun2025associative",
    ):
        assert expected in card.content, expected


def test_the_card_s_example_runs(tmp_path: Path) -> None:
    model = ait.create_model("ait_tiny", depth=1, img_size=(8, 12), in_chans=1, question_dim=5, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    example = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(tmp_path))
    names: dict[str, object] = {}
    exec(example, names)
    assert names["logits"].shape == (1, 10) and names["logits"].dtype == torch.float64


def test_the_license_is_left_to_who_publishes_and_a_card_that_is_there_stays(tmp_path: Path) -> None:
    model = ait.create_model("vit_tiny", depth=1, img_size=8)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license" not in card.split("---")[1] and "Who publishes the model sets" in card
    assert "compared with" in card and "memory entries" not in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("details", "error", "message"),
    [
        ({"mean": (0.5,)}, ValueError, "expected both mean and std"),
        ({"classes": ("a",)}, ValueError, "expected 10 classes, got 1"),
        ({"licence": "mit"}, TypeError, "licence"),
    ],
)
def test_a_card_that_would_be_wrong_is_refused(details: dict, error: type[Exception], message: str) -> None:
    from ait.integrations.hub import model_card

    with pytest.raises(error, match=message):
        model_card(ait.create_model("vit_tiny", depth=1, img_size=8), **details)


def test_without_huggingface_hub_the_error_names_the_extra_and_folders_still_load(tmp_path: Path) -> None:
    model = ait.create_model("vit_tiny", depth=1, img_size=8)
    model.save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["huggingface_hub"] = None
import ait
model = ait.VisionTransformer.from_pretrained({str(tmp_path)!r})
for call in (lambda: model.save_pretrained({str(tmp_path / "new")!r}), lambda: model.from_pretrained("a/b")):
    try:
        call()
    except ImportError as error:
        assert "pip install 'associative-transformer[hf]'" in str(error), error
    else:
        raise AssertionError("no error")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    assert not (tmp_path / "new").exists()


def test_importing_the_package_imports_neither_huggingface_hub_nor_safetensors() -> None:
    code = "import ait, sys; assert not {'huggingface_hub', 'safetensors'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
