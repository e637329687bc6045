"""Notebooks as pages: words, code and what it printed and drew, as committed. Nothing is run."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path

from matplotlib import mathtext

MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
CODE = re.compile(r"(`[^`]*`)")
TO_EXPERIMENTS = re.compile(r"\[([^\]]*)\]\(\.\./(experiments/[\w./]+)[^)]*\)")
# From a document, as in the repository; and from one notebook, or their list, to another.
TO_NOTEBOOK = re.compile(r"\]\(((?:\.\./)*)\.\./(notebooks/\d-[\w-]+)\.ipynb\)")
BESIDE = re.compile(r"\]\((\d-[\w-]+)\.ipynb\)")
TO_LIST = re.compile(r"\]\(((?:\.\./)*)\.\./notebooks/README\.md\)")


def page_of(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by name.

    Raises:
        ValueError: a formula is none that matplotlib can draw.
    """
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_words(source))
            if len(parts) == 1:
                parts.append(f'<a href="../{path.name}" download>The notebook</a>, shown here as it ran.')
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Figure that the cell drew]({name}){{ .figure }}")
            else:
                printed = "".join(output.get("text", data.get("text/plain", ""))).strip("\n")
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n", pictures


def link_pages(markdown: str) -> str:
    """Links to notebooks, which lie beside ``docs/``, become links to their pages, which lie in it."""
    markdown = TO_LIST.sub(r"](\1notebooks/index.md)", markdown)
    return BESIDE.sub(r"](\1.md)", TO_NOTEBOOK.sub(r"](\1\2.md)", markdown))


def _words(source: str) -> str:
    source = TO_EXPERIMENTS.sub(r"\1 (`\2`)", source).replace("](../docs/", "](../")
    pieces = CODE.split(source)  # code at odd places
    pieces[::2] = [MATH.sub(lambda match: _formula(match[1] or match[2], bool(match[1])), each) for each in pieces[::2]]
    return "".join(pieces)


def _formula(tex: str, display: bool) -> str:
    """A picture whose text is the formula; as large as the words around, and on their line."""
    tex, content = " ".join(tex.split()), io.BytesIO()
    drawn_tex = tex.replace(r"\frac", r"\dfrac") if display else tex
    depth = mathtext.math_to_image(f"${drawn_tex}$", content, dpi=72, format="svg")
    drawn = content.getvalue()
    size = re.search(rb'width="([\d.]+)pt" height="([\d.]+)pt"', drawn)
    assert size is not None
    width, height, below = (float(each) / 10 for each in (size[1], size[2], depth))  # em: it was drawn at 10 points
    style = f"width:{width:.2f}em;height:{height:.2f}em" + ("" if display else f";vertical-align:{-below:.2f}em")
    # As numbers, so that Markdown takes nothing in it for its own.
    said = "".join(each if each.isalnum() or each == " " else f"&#{ord(each)};" for each in tex)
    kind = "math display" if display else "math"
    encoded = base64.b64encode(drawn).decode()
    return f'<img class="{kind}" alt="{said}" style="{html.escape(style)}" src="data:image/svg+xml;base64,{encoded}">'
