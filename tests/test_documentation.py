"""README and docs: every Python block runs, and the site builds without a warning.

Bash blocks are in ``test_documented_commands.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "ait" / "models" / "weights" / "README.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), CARD]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text()), 1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_example_runs_in_an_empty_folder(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {})


def test_all_pages_with_examples_are_found():
    assert {"README.md", "docs/index.md", "docs/layer.md"} <= {str(page.relative_to(ROOT)) for page in PAGES}
    assert len(BLOCKS) > 10


@pytest.fixture
def docs_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


def test_figures_are_drawn_by_their_script_and_small(docs_folder, tmp_path):
    for package in ("matplotlib", "safetensors", "sklearn"):
        pytest.importorskip(package)
    import figures

    figures.main(tmp_path, steps=2)
    names = {path.name for path in tmp_path.iterdir()}
    kept = {path.name: path.stat().st_size for path in figures.FOLDER.iterdir()}
    assert kept.keys() == names and max(kept.values()) < 200_000
    page = (ROOT / "docs" / "layer.md").read_text()
    assert all(f"](figures/{name})" in page for name in names)


def test_performance_shows_rows_of_the_results_and_no_number_of_its_own(docs_folder):
    pytest.importorskip("mkdocs")
    pytest.importorskip("matplotlib")
    import hooks

    page = (ROOT / "docs" / "performance.md").read_text()
    shown = hooks.on_page_markdown(page)
    assert "{{" not in shown
    rows = [line for line in shown.splitlines() if line.startswith("| ") and "median" not in line]
    results = "".join(path.read_text() for path in hooks.RESULTS.glob("operators*.md"))
    assert len(rows) > 20 and all(row.split(" | ")[1] in results for row in rows)
    prose = hooks.MEASURED.sub("", re.sub(r"```.*?```|`[^`]*`", "", page, flags=re.DOTALL))
    assert re.findall(r"\d+\.\d+", prose) == []
    with pytest.raises(ValueError, match="a row that begins with 'no such'"):
        hooks.measured("operators", ["no such"])


def test_notebook_pages_show_words_code_output_figures_and_formulas(docs_folder):
    pytest.importorskip("matplotlib")
    from notebook_pages import link_pages, page_of

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, pictures = page_of(path)
        cells = json.loads(path.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        for cell in cells:
            assert cell["cell_type"] == "markdown" or "".join(cell["source"]) in page
        for output in outputs:
            assert "".join(output.get("text", "")).strip("\n") in page
        assert len(pictures) == sum("image/png" in output.get("data", {}) for output in outputs) > 0
        assert all(f"]({name})" in page and content.startswith(b"\x89PNG") for name, content in pictures.items())
        words = re.sub(r"```.*?```|`[^`]*`", "", page, flags=re.DOTALL)
        assert "$" not in words and "](../docs/" not in words and "](../experiments/" not in words
    for link, on_site in {
        "[a](../../notebooks/2-triangle.ipynb)": "[a](../notebooks/2-triangle.md)",
        "[a](../notebooks/README.md)": "[a](notebooks/index.md)",
        "[a](2-triangle.ipynb)": "[a](2-triangle.md)",
        "[a](x.ipynb)": "[a](x.ipynb)",
    }.items():
        assert link_pages(link) == on_site


def test_links_of_documents_and_notebooks_lead_to_files_of_the_repository():
    texts = {page: page.read_text() for page in (*PAGES, *ROOT.glob("*.md"), *ROOT.glob("*/README.md"))}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts[path] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = 0
    for page, text in texts.items():
        for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), (page, target)
            found += 1
    assert found > 50


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "reference" / "layer" / "index.html").read_text()
    assert "num_slots" in page and "key_padding_mask" in page  # docstrings reached the site
    assert ":class:" not in page and ":func:" not in page
    for name, words in {"recording": "slot_perplexity", "viz": "plot_rollout"}.items():
        assert words in (tmp_path / "site" / "reference" / name / "index.html").read_text()
    triangle = (tmp_path / "site" / "notebooks" / "2-triangle" / "index.html").read_text()
    assert "mean cosine between slots" in triangle and "2-triangle-1.png" in triangle
    assert "notebooks/2-triangle/" in (tmp_path / "site" / "how-to" / "capacity" / "index.html").read_text()
    assert "GFLOP/s" in (tmp_path / "site" / "performance" / "index.html").read_text()
