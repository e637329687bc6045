"""Makes the docstrings' reStructuredText, which editors and ``help()`` show, readable on the site; adds the notebooks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>~?([^<]*)</code>")
LITERAL_BLOCK = re.compile(r"<p>::</p>\s*")
COLONS_BEFORE_BLOCK = re.compile(r"::</p>")


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`Name``` becomes code, and ``::`` before a block of code a colon, or nothing."""
    html = ROLE.sub(r"<code>\1</code>", html)
    return COLONS_BEFORE_BLOCK.sub(":</p>", LITERAL_BLOCK.sub("", html))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """The notebooks, as files beside the pages, and their list as the page about them."""
    files.append(File.generated(config, "notebooks/index.md", abs_src_path=str(NOTEBOOKS / "README.md")))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
