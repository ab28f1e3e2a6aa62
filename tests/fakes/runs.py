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


def same_but_for_the_manifest(one: Path, other: Path) -> None:
    """Asserts that two artifacts have the same files with the same bytes; the manifest tells when and where."""
    for path in sorted(one.iterdir()):
        if path.name != "quantkit.json":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
