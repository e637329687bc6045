"""What the site needs beyond its pages: readable docstrings, tables of what was measured, and the notebooks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from notebook_pages import link_pages, page_of

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>~?([^<]*)</code>")
LITERAL_BLOCK = re.compile(r"<p>::</p>\s*")
COLONS_BEFORE_BLOCK = re.compile(r"::</p>")
MEASURED = re.compile(r"^\{\{ ([\w-]+): (.*) \}\}$", re.MULTILINE)
RESULTS = NOTEBOOKS.parent / "experiments" / "results"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``{{ file: beginning | beginning }}`` becomes the rows of ``experiments/results/file.md`` that begin so,
    and links to notebooks lead to their pages."""
    return link_pages(MEASURED.sub(lambda match: measured(match[1], match[2].split(" | ")), markdown))


def measured(name: str, beginnings: list[str]) -> str:
    """Machine, and a table of what was measured (with its note), the ratio, what was achieved, its limit, the shape.

    Raises:
        ValueError: no row begins with one of ``beginnings``.
    """
    machine, _, *lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    cells = [line.removeprefix("|").removesuffix("|").split("|") for line in lines[2:] if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in cells]
    table = [
        f"*{machine}*",
        "",
        "| what | median (quartiles) | achieved | of the limit | shape |",
        "|---|---|---|---|---|",
    ]
    for beginning in beginnings:
        chosen = [row for row in rows if row[0].startswith(beginning)]
        if not chosen:
            raise ValueError(f"docs: expected a row that begins with {beginning!r} in results/{name}.md, got none")
        for what, ratio, _gate, _verdict, achieved, limit, note, shape in chosen:
            table.append(f"| {what}{f' ({note})' if note else ''} | {ratio} | {achieved} | {limit} | {shape} |")
    return "\n".join(table)


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`Name``` becomes code, and ``::`` before a block of code a colon, or nothing.

    Docstrings have these for editors and ``help()``, which read reStructuredText.
    """
    html = ROLE.sub(r"<code>\1</code>", html)
    return COLONS_BEFORE_BLOCK.sub(":</p>", LITERAL_BLOCK.sub("", html))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """The notebooks, as pages and as files beside them, and their list as the page about them."""
    files.append(File.generated(config, "notebooks/index.md", abs_src_path=str(NOTEBOOKS / "README.md")))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        page, pictures = page_of(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
