"""Where quantkit finds what ships with it, and where it keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.errors import MissingDependencyError
from quantkit.shipped import shipped_folder


def resource_folder(kind: str) -> Path:
    """The folder of the "recipes" or "calibration" definitions that ship with quantkit.

    Raises MissingDependencyError when the installation lacks it.
    """
    folder = shipped_folder(kind)
    if not folder.is_dir():
        raise MissingDependencyError(
            f"{folder}: no such folder; the {kind} that ship with quantkit are missing",
            hint="the installation is incomplete: install quantkit again",
        )
    return folder


def cache_folder() -> Path:
    """The folder of everything quantkit keeps but can make again; whoever writes there makes it.

    $QUANTKIT_CACHE, else quantkit under $XDG_CACHE_HOME, else ~/.cache/quantkit.
    """
    own = os.environ.get("QUANTKIT_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification has relative paths ignored
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "quantkit"
