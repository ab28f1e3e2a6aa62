"""What there is to choose from: every shipped recipe that the engine runs, its need and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from quantkit.advise.needs import (
    bits_per_weight,
    cache_bytes,
    misfit,
    needed,
    parameters_that_fit,
    unquantized_bytes,
    weight_bytes,
)
from quantkit.advise.rules import Rules
from quantkit.errors import DataError, RecipeError
from quantkit.model.source import Source
from quantkit.recipe import Recipe, load_recipe
from quantkit.schema import Frozen
from quantkit.shipped import list_recipes

UNQUANTIZED = "unquantized (16 bits)"


class Measured(Frozen):
    """What a results file says of a recipe, against the baseline of the same file."""

    where: str = Field(description="the results' model, row and file")
    same_model: bool = Field(description="whether it is the model that was asked about")
    decode_speedup: float | None = None
    prefill_speedup: float | None = None
    kl: float | None = None
    recovered: float | None = None


class Candidate(Frozen):
    """One recipe, or the model as it is. Bytes are None where no model was named."""

    recipe: str
    method: str
    format: str | None
    calibrated: bool
    bits_per_weight: float
    weight_bytes: int | None = None
    cache_bytes: int | None = Field(None, description="of one sequence")
    needed_bytes: int | None = Field(None, description="weights, one sequence's cache, overhead")
    fits: bool | None = None
    sequences: int | None = Field(None, description="how many sequences' caches fit beside the weights")
    parameters_that_fit: float
    measured: tuple[Measured, ...] = ()


def candidates(
    memory: int, rules: Rules, *, source: Source | None, engine: str | None, context: int, results: Sequence[Path]
) -> tuple[list[Candidate], dict[str, str]]:
    """Every recipe that the engine runs and the model's shapes allow; and {recipe: why not} of the others."""
    found = [] if source is None else [_unquantized(memory, rules, source, context)]
    left_out: dict[str, str] = {}
    runner = None if engine is None else rules.engine(engine)
    known = _measurements(results, source)
    for shipped in list_recipes():
        if shipped.kind != "recipe":
            continue
        recipe = load_recipe(shipped.name)
        bits = bits_per_weight(recipe, rules)
        plain = recipe.method.name in rules.yardsticks and bits < 8
        if plain or shipped.name.endswith(rules.yardstick_endings):
            left_out[shipped.name] = "a yardstick for the others"
            continue
        refused = None if runner is None else runner.refuses(recipe)
        if refused is not None:
            left_out[shipped.name] = f"{engine} {refused}"
            continue
        try:
            found.append(_candidate(shipped.name, recipe, bits, memory, rules, source, context, known))
        except RecipeError as error:
            left_out[shipped.name] = misfit(shipped.name, error)
    return found, left_out


def _candidate(
    name: str,
    recipe: Recipe,
    bits: float,
    memory: int,
    rules: Rules,
    source: Source | None,
    context: int,
    known: Sequence[tuple[str, str, Measured]],
) -> Candidate:
    label, format_name = recipe.method.label(), recipe.resolved_format.name
    return Candidate(
        recipe=name,
        method=label,
        format=format_name,
        calibrated=recipe.method.calibrated,
        bits_per_weight=bits,
        parameters_that_fit=parameters_that_fit(memory, bits, rules),
        measured=tuple(found for method, form, found in known if (method, form) == (label, format_name)),
        **({} if source is None else _bytes(weight_bytes(name, recipe, source), memory, rules, source, context)),
    )


def _unquantized(memory: int, rules: Rules, source: Source, context: int) -> Candidate:
    return Candidate(
        recipe=UNQUANTIZED,
        method="none",
        format=None,
        calibrated=False,
        bits_per_weight=16.0,
        parameters_that_fit=parameters_that_fit(memory, 16.0, rules),
        **_bytes(unquantized_bytes(source), memory, rules, source, context),
    )


def _bytes(weights: int, memory: int, rules: Rules, source: Source, context: int) -> dict[str, Any]:
    """The fields of a candidate that need a model."""
    cache = cache_bytes(source.config, context, rules)
    need = int(needed(weights, cache or 0, rules))
    room = memory - needed(weights, 0, rules)
    return {
        "weight_bytes": weights,
        "cache_bytes": cache,
        "needed_bytes": need,
        "fits": need <= memory,
        "sequences": None if not cache else max(0, int(room // cache)),
    }


def result_files(folder: Path) -> list[Path]:
    """Every results.json in a folder and below it. Raises DataError when there is none."""
    found = sorted(folder.rglob("results.json")) if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder}: no results.json in it", hint="`quantkit run` and `bench --out` leave them")
    return found


def _measurements(paths: Sequence[Path], source: Source | None) -> list[tuple[str, str, Measured]]:
    """(method's label, format, what was measured) of every row."""
    from quantkit.report import load
    from quantkit.report.comparison import compare

    found = []
    for path in paths:
        results = load(path)
        (comparison,) = compare([results])
        same = source is not None and _name(source.path) == results.model.rsplit("/", 1)[-1]
        for line in comparison.lines[1:]:
            cells = {key: cell.value for key, cell in line.cells.items()}
            measured = Measured(
                where=f"{results.model}, {line.label} in {path}",
                same_model=same,
                **{key: cells.get(key) for key in ("decode_speedup", "prefill_speedup", "kl", "recovered")},
            )
            found.append((line.method or "", line.format or "", measured))
    return found


def _name(path: Path) -> str:
    return path.name.removesuffix(".gguf")
