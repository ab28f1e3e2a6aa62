"""The rules of advice, as data: rules.yaml beside this file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from quantkit.errors import UsageError
from quantkit.recipe import Recipe
from quantkit.schema import Frozen
from quantkit.validation import suggestion

Criterion = Literal["quality", "bits", "usable", "kernels", "bytes", "decode", "prefill", "sequences", "calibrated"]


class Overhead(Frozen):
    share: float
    fixed_bytes: float


class Engine(Frozen):
    """What an engine reads: formats, and for some of them the values that settings of the method may have."""

    formats: tuple[str, ...]
    asks: dict[str, dict[str, tuple[Any, ...]]] = Field(default_factory=dict)
    serves: bool = False

    def refuses(self, recipe: Recipe) -> str | None:
        """Why the engine does not run what a recipe makes, None when it does."""
        name = recipe.resolved_format.name
        if name not in self.formats:
            return f"does not read {name}"
        for key, values in self.asks.get(name, {}).items():
            found = getattr(recipe.method, key, None)
            if found not in values:
                return f"reads {name} with {key} {' or '.join(map(str, values))} only, not {found}"
        return None


class Problem(Frozen):
    question: str
    why: str
    order: tuple[Criterion, ...]
    also: tuple[str, ...]


class Rules(Frozen):
    overhead: Overhead
    context: int
    cache_bytes_per_value: int
    typical_layer: tuple[int, int]
    yardsticks: tuple[str, ...]
    yardstick_endings: tuple[str, ...]
    usable_bits: float
    decoded_first: tuple[str, ...]
    engines: dict[str, Engine]
    problems: dict[str, Problem]

    def engine(self, name: str) -> Engine:
        """The engine of a name, whatever its capitals. Raises UsageError with the names there are."""
        known = self.engines.get(name.lower())
        if known is None:
            raise UsageError(f'--engine: "{name}" is not known; {suggestion(name, list(self.engines))}')
        return known


@cache
def load_rules() -> Rules:
    """Read rules.yaml."""
    return Rules.model_validate(yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8")))
