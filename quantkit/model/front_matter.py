"""The YAML at the head of a model card, read as what it is: text from elsewhere that may hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.strict_yaml import parse_yaml

CARD = "README.md"
MAX_BYTES = 1_000_000
"""Of a card that is looked at; the head that counts is in its first few hundred bytes."""


def front_matter(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's model card; empty when there is none, or none that can be read."""
    path = folder / CARD
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES).decode("utf-8", errors="replace").removeprefix("\ufeff")
    except OSError:
        return {}
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((place for place, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return {}
    try:
        found = parse_yaml("\n".join(lines[1:end]), str(path))
    except RecipeError:
        return {}
    return found if isinstance(found, dict) else {}
