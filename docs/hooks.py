"""Makes the docstrings' reStructuredText, which editors and ``help()`` show, readable on the site."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>~?([^<]*)</code>")
LITERAL_BLOCK = re.compile(r"<p>::</p>\s*")
COLONS_BEFORE_BLOCK = re.compile(r"::</p>")


def on_page_content(html: str, **_: Any) -> str:
    """``:class:`Name``` becomes code, and ``::`` before a block of code a colon, or nothing."""
    html = ROLE.sub(r"<code>\1</code>", html)
    return COLONS_BEFORE_BLOCK.sub(":</p>", LITERAL_BLOCK.sub("", html))
