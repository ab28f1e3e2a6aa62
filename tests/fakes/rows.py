"""Small data sets for the tests of calibration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ("quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "seven", "wizards", "mix", "bright", "potions")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different sentences of 30 words."""
    draw = random.Random(seed)
    return [f"{number}: " + " ".join(draw.choices(WORDS, k=30)) + "." for number in range(count)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """One JSON object a line."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
