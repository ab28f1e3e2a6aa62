"""The verb `quantize` as tests want it: on the CPU, without a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.jobs import quantize
from quantkit.manifest import Manifest
from quantkit.progress import Progress


def quietly(recipe: str, model: Path, out: Path, settings: Sequence[str], **options: Any) -> Manifest:
    """One artifact. options: of `jobs.quantize`, force among them."""
    given = {"device": "cpu", "force": False, "progress": Progress(quiet=True), **options}
    return quantize(recipe, model=str(model), out=out, settings=list(settings), **given)
