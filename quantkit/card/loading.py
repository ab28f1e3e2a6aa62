"""How to load an artifact in each engine that takes it. Kept as data in loading.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter

from quantkit.manifest import Manifest
from quantkit.schema import Frozen

MARLIN_BITS = (4, 8)


class Loading(Frozen):
    """One engine and one format. only: which artifacts it takes, where those are not all of the format."""

    engine: str
    code: str
    language: Literal["sh", "python"] = "sh"
    install: str | None = None
    note: str | None = None
    only: Literal["symmetric, 4 or 8 bits"] | None = None


@cache
def load_loadings() -> dict[str, tuple[Loading, ...]]:
    """Read loading.yaml, which stands beside this file: format name -> engines, the likeliest first."""
    text = Path(__file__).with_name("loading.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, tuple[Loading, ...]]).validate_python(yaml.safe_load(text))


def loadings_of(manifest: Manifest) -> list[Loading]:
    """The engines that take this artifact; none when its format is not in the table."""
    known = load_loadings().get(manifest.format, ())
    return [loading for loading in known if loading.only is None or _symmetric_4_or_8(manifest.recipe)]


def _symmetric_4_or_8(recipe: Mapping[str, Any]) -> bool:
    """Whether every linear has a grid that the Marlin kernels of vLLM and SGLang take; they refuse others."""
    method = recipe["method"]
    changed = [settings for settings in recipe.get("overrides", {}).values() if isinstance(settings, dict)]
    return all(
        settings.get("bits") in MARLIN_BITS and settings.get("symmetric")
        for settings in (method, *({**method, **change} for change in changed))
    )
