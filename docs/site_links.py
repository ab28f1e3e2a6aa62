"""Links of the documents that lead out of docs/ work in a checkout; on the site they become the path's name."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page: `[text](../path)` becomes text and the path."""
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2]}`)", markdown)
