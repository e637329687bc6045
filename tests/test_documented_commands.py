"""Commands in bash blocks of the documents: each one runs here, on small data, or stands in NOT_RUN with a reason.

``train.py`` trains for an epoch on a handful of images, with the arguments of the document otherwise; what only reads
is run as it stands, and what it prints must stand in the page. Of the rest the arguments are checked.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
SITE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "notebooks" / "README.md"]
OTHERS = (
    "CONTRIBUTING.md",
    "csrc/README.md",
    "examples/README.md",
    "experiments/README.md",
    "ait/models/weights/README.md",
)
PAGES = [*SITE, *(ROOT / name for name in OTHERS)]
FENCE = re.compile(r"^[ \t]*```([^\n]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)

# Beginning of a command: why it is not run, and the test that runs what it does.
NOT_RUN = {
    "python experiments/bench/operators.py": ("minutes, on an idle machine", "tests/experiments/test_bench.py"),
    "python experiments/bench/sweep.py": ("minutes, on an idle machine", "tests/experiments/test_bench.py"),
    "python experiments/evaluate.py": ("needs CIFAR-10", "tests/experiments/test_evaluate.py"),
    "python experiments/export_weights.py": ("needs a finished run", "tests/experiments/test_evaluate.py"),
    "python experiments/transfer.py --data-dir": ("hours, and CIFAR-100", "tests/experiments/test_transfer.py"),
    "python experiments/recall.py": ("half a minute", "tests/experiments/test_recall.py"),
    "python experiments/gates.py": ("minutes", "tests/experiments/test_gates.py"),
    "python examples/": ("run there, in processes of their own", "tests/integrations/test_trainers.py"),
    "make": ("builds, and then runs the rest of the tests", "tests/packaging"),
    ".venv/bin/python": ("runs the rest of the tests, or builds", "tests/packaging"),
}


def commands_of(block: str) -> list[list[str]]:
    """The words of each command, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = {
    (page.relative_to(ROOT).as_posix(), " ".join(words)): words
    for page in PAGES
    for kind, block in FENCE.findall(page.read_text(encoding="utf-8"))
    if kind == "bash"
    for words in commands_of(block)
}
CHOSEN = [pytest.param(page, words, id=f"{page}: {command}"[:120]) for (page, command), words in COMMANDS.items()]


def beginning(words: list[str]) -> str | None:
    return next((known for known in NOT_RUN if " ".join(words).startswith(known)), None)


@pytest.mark.parametrize("page, words", CHOSEN)
def test_documented_command(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = beginning(words)
    program = " ".join(words[:2])
    if program == "pip install":
        check_install(words[2:])
    elif program == "python -m":
        convert(words[2:], tmp_path, monkeypatch)
    elif program == "python experiments/train.py":
        train(words[2:], tmp_path, monkeypatch)
    elif program == "python experiments/results.py" or " ".join(words) == "python experiments/transfer.py --table":
        reads(page, words, monkeypatch, capsys)
    else:
        assert known is not None, f"neither run nor listed in NOT_RUN: {' '.join(words)}"
        check_arguments(words)


def test_what_is_not_run_is_still_documented_and_names_a_test_that_is_there() -> None:
    assert {beginning(words) for words in COMMANDS.values()} - {None} == NOT_RUN.keys()
    for reason, place in NOT_RUN.values():
        assert reason and (ROOT / place).exists(), place


def test_every_block_of_the_site_is_python_or_bash_and_none_is_overlooked() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        kinds = [kind for kind, _ in FENCE.findall(text)]
        assert text.count("```") == 2 * len(kinds), page
        allowed = {"python", "bash"} | (set() if page in SITE else {"", "cpp"})
        assert set(kinds) <= allowed, page
        # tests/test_documentation.py runs those that begin at the margin.
        assert kinds.count("python") == len(re.findall(r"^```python\n", text, re.MULTILINE)), page
    assert len(COMMANDS) > 30


def test_commands_within_sentences_name_files_and_targets_that_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    for page in PAGES:
        for command in re.findall(r"`((?:make|pytest|python) [^`\n]+)`", page.read_text(encoding="utf-8")):
            program, *words = shlex.split(command)
            if program == "make":
                named = [word for word in words if "=" not in word]
                assert set(named) <= targets, (page, command)
            else:
                paths = [word for word in words if "/" in word and not word.startswith(("--", "runs/", "data/", "/"))]
                assert all((ROOT / path).exists() for path in paths), (page, command)
            seen += 1
    assert seen > 15


def check_install(words: list[str]) -> None:
    """It installs this project, from a clone or by name, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(words) == 1, words
    match = re.fullmatch(rf"(?:\.|{re.escape(project['name'])})(?:\[([\w,]+)\])?", words[0])
    assert match is not None, words
    assert set((match[1] or "").split(",")) - {""} <= project["optional-dependencies"].keys(), words


def check_arguments(words: list[str]) -> None:
    """Files and targets are there, and programs take the arguments."""
    if words[0] == "make":
        command = ["make", "--dry-run", f"PYTHON={sys.executable}", *words[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr
        return
    paths = [word for word in words[1:] if word.endswith(".py") or word.startswith("tests/")]
    assert all((ROOT / path).exists() for path in paths), words
    name, arguments = Path(words[1]).stem, words[2:]
    if name in ("operators", "sweep", "evaluate", "export_weights", "transfer"):
        tyro = pytest.importorskip("tyro")
        module = __import__(name)
        config = tyro.cli(getattr(module, "Config", None) or module.Options, args=arguments)
        if name == "operators":
            assert set(config.sections) <= module.SECTIONS.keys()
    elif words[0] == "python":
        assert arguments == [], words


def reads(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command that only reads, and finds what it prints in the page."""
    pytest.importorskip("tyro")
    program = __import__(Path(words[1]).stem)
    if words[2:] == ["--table"]:
        monkeypatch.setattr(sys, "argv", words[1:])
        program.main()
    else:
        program.main([str(path) for word in words[2:] for path in sorted(ROOT.glob(word))])
    text = (ROOT / page).read_text(encoding="utf-8")
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) > 2
    for line in printed:
        assert line in text, line


def train(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains with these arguments for an epoch, on few images and with a small model."""
    pytest.importorskip("PIL")
    pytest.importorskip("sklearn")
    from ait.data import splits
    from tests.experiments.tiny import TINY_MODEL, TINY_WORKSPACE, write_tiny_cifar

    program = __import__("train")
    if arguments == ["--help"]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        assert stopped.value.code == 0
        return
    config = program.tyro.cli(program.Config, args=arguments)
    assert config.data_dir is None or config.data in config.data_dir.name
    for name, sizes in {"triangle": (64, 20), "sort_of_clevr": (12, 4)}.items():
        monkeypatch.setitem(splits._SETS, name, dataclasses.replace(splits._SETS[name], sizes=sizes))
    changes: dict[str, Any] = {"out": tmp_path / "run", "epochs": 1, "threads": 1, "batch_size": 16}
    changes["options"] = config.options + TINY_MODEL + (TINY_WORKSPACE if "ait" in config.model else ())
    if config.data_dir is not None:
        folder = tmp_path / "data"
        changes["data_dir"] = write_tiny_cifar(folder, 100 if config.data == "cifar100" else 10)
    threads = torch.get_num_threads()
    try:
        result = program.train(dataclasses.replace(config, **changes), progress=False)
    finally:
        torch.set_num_threads(threads)
    assert result["data"] == config.data and result["model"] == config.model
    assert (tmp_path / "run" / "report.html").is_file() == config.report


def convert(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converts a made-up checkpoint of the size that is named, and loads what comes out as the page says."""
    pytest.importorskip("safetensors")
    import ait
    from ait.convert.__main__ import main
    from tests.released_model import released_state_dict

    module, source, output, option, name = words
    assert (module, option, name) == ("ait.convert", "--model", "ait_small")
    sizes: dict[str, Any] = dict(depth=2, width=768, hidden=3072, slots=32, slot_dim=32, heads=8, patch=4, side=8)
    monkeypatch.chdir(tmp_path)
    torch.save(released_state_dict(dtype=torch.float32, classes=10, **sizes), source)
    assert main(words[1:]) == 0
    model = ait.AssociativeTransformer.from_pretrained(output)
    assert sum(p.numel() for p in model.parameters()) > 15_000_000
