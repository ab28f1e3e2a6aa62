"""Where the files lie that come with quantkit: in the repository, or inside the installed package."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder of the "recipes" or "calibration" definitions that ship with quantkit."""
    installed = _PACKAGE / "_data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def header_comment(text: str) -> str:
    """The comment at the head of a YAML file, its lines joined: what the file is for."""
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ").rstrip() for line in head)
