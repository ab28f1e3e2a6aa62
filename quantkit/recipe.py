"""Recipes and suites from files: read, changed by --set, validated whole, every problem said at once.

The models themselves are in quantkit/sections.py. Reading a file has no side effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from quantkit.errors import RecipeError
from quantkit.methods import METHODS
from quantkit.sections import (
    SCHEMA_VERSION,
    AccuracyBench,
    AnyBench,
    CalibrationSection,
    DivergenceBench,
    GateSection,
    MemoryBench,
    ModelSection,
    Recipe,
    SpeculativeBench,
    Suite,
    SuiteEntry,
    ThroughputBench,
    recipe_sha256,
)
from quantkit.settings import Change, apply_changes, parse_key, parse_setting
from quantkit.shipped import Shipped, find_recipe, list_recipes, recipe_text
from quantkit.strict_yaml import parse_yaml, read_text
from quantkit.validation import Problem, dotted, problems_of

__all__ = [
    "SCHEMA_VERSION",
    "AccuracyBench",
    "AnyBench",
    "CalibrationSection",
    "DivergenceBench",
    "GateSection",
    "HINT",
    "MemoryBench",
    "ModelSection",
    "Recipe",
    "Shipped",
    "Suite",
    "SuiteEntry",
    "SpeculativeBench",
    "ThroughputBench",
    "json_schema",
    "list_recipes",
    "load_any",
    "load_recipe",
    "load_suite",
    "recipe_sha256",
    "recipe_text",
    "suite_recipes",
    "validate_file",
]

HINT = "`quantkit recipes schema` has every key with its meaning, `quantkit recipes show NAME` an example"

Section = TypeVar("Section", Recipe, Suite)


@dataclass(frozen=True)
class _File:
    """A YAML file as it was read. shown: what messages call it."""

    path: Path
    shown: str
    raw: dict[str, Any]

    @property
    def is_suite(self) -> bool:
        return "recipes" in self.raw


def load_recipe(name_or_path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A validated recipe: a shipped name or a file, with `KEY=VALUE` settings applied. Raises RecipeError."""
    file = _read(name_or_path)
    if file.is_suite:
        raise RecipeError(
            f"{file.shown}: is a suite (it has `recipes:`), expected a recipe",
            hint=f"`quantkit run {name_or_path}` runs all of it",
        )
    return _recipe(file, [parse_setting(text) for text in settings])


def load_suite(name_or_path: str | Path, settings: Sequence[str] = ()) -> Suite:
    """A validated suite, every recipe it names included. Raises RecipeError.

    Settings of `name`, `model`, `calibration`, `bench` and `recipes` change the suite. Those of `method` change every
    recipe whose method has the key; those of `format`, `overrides`, `skip` and `seed` every recipe.
    """
    file = _read(name_or_path)
    if not file.is_suite:
        raise RecipeError(
            f"{file.shown}: is a recipe (it has no `recipes:`), expected a suite",
            hint=f"`quantkit quantize {name_or_path}` makes its artifact",
        )
    changes = [parse_setting(text) for text in settings]
    for_recipes = tuple(change for change in changes if change.path[0] in _RECIPE_ONLY)
    suite = _validated(Suite, file.raw, [change for change in changes if change not in for_recipes], file.shown)
    suite._folder, suite._file, suite._changes = file.path.parent, file.shown, for_recipes
    suite_recipes(suite)
    return suite


_RECIPE_ONLY = set(Recipe.model_fields) - set(Suite.model_fields)


def load_any(name_or_path: str | Path, settings: Sequence[str] = ()) -> Recipe | Suite:
    """A validated recipe or suite, whichever the file holds. Raises RecipeError."""
    return load_suite(name_or_path, settings) if _read(name_or_path).is_suite else load_recipe(name_or_path, settings)


def suite_recipes(suite: Suite) -> list[tuple[str, Recipe]]:
    """Each recipe of a suite with the label of its row. Raises RecipeError with the problems of all entries.

    Onto the recipe's file go, in this order, the keys of the suite's model and calibration, its entry's `set`, and the
    settings that the suite was loaded with.
    """
    pairs: list[tuple[str, Recipe]] = []
    problems: list[str] = []
    used: set[int] = set()
    for entry in suite.recipes:
        where = f"{suite._file}: recipes.{dotted((entry.row_label,))}"
        try:
            file = _read(entry.recipe, suite._folder, where=f"{where}.recipe: ")
            if file.is_suite:
                raise RecipeError(f"{where}.recipe: {file.shown} is a suite, expected a recipe")
            fitting = {index: change for index, change in enumerate(suite._changes) if _fits(change, file.raw)}
            used.update(fitting)
            changes = [*_suite_changes(suite), *_entry_changes(entry, f"{where}.set: "), *fitting.values()]
            pairs.append((entry.row_label, _recipe(file, changes)))
        except RecipeError as error:
            problems += error.message.split("\n")
    for index, change in enumerate(suite._changes):
        if index not in used:
            problems.append(f"{change.origin}{dotted(change.path)}: no recipe of the suite has a method with this key")
    if problems:
        raise RecipeError.from_problems(dict.fromkeys(problems), HINT)
    return pairs


def validate_file(name_or_path: str | Path) -> list[str]:
    """Every problem of a recipe or suite file, one line each; none when it is valid."""
    try:
        load_any(name_or_path)
    except RecipeError as error:
        return error.message.split("\n")
    return []


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe or a suite, for editors."""
    schema = TypeAdapter(Recipe | Suite).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "quantkit recipe or suite", **schema}


def _read(name_or_path: str | Path, folder: Path | None = None, where: str = "") -> _File:
    path, shown = find_recipe(name_or_path, folder, where)
    raw = parse_yaml(read_text(path, shown), shown)
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else "text" if isinstance(raw, str) else f"a {type(raw).__name__}"
        raise RecipeError(f"{shown}: found {kind}, expected a mapping with keys such as method", hint=HINT)
    return _File(path, shown, raw)


def _recipe(file: _File, changes: Sequence[Change]) -> Recipe:
    return _validated(Recipe, file.raw, changes, file.shown)


def _validated(model: type[Section], raw: dict[str, Any], changes: Sequence[Change], shown: str) -> Section:
    """The model of a file with changes put onto it. Raises RecipeError with every problem of both."""
    data, placed, lines = apply_changes(raw, changes)
    try:
        valid = model.model_validate(data)
    except ValidationError as error:
        for problem in problems_of(error, model):
            lines.append(f"{_origin(problem, placed, shown)}{dotted(problem.path, data)}: {problem.text}")
    if lines:
        raise RecipeError.from_problems(lines, HINT)
    return valid


def _origin(problem: Problem, changes: Sequence[Change], shown: str) -> str:
    """Where a problem came from: the last change at or above its place, else the file."""
    for change in reversed(changes):
        short = min(len(change.path), len(problem.path)) if problem.unknown else len(change.path)
        if change.path[:short] == problem.path[:short]:
            return change.origin
    return f"{shown}: "


def _suite_changes(suite: Suite) -> list[Change]:
    """What a suite sets for all of its recipes: the keys its file gives, not the defaults of the others."""
    sections = {"model": suite.model, "calibration": suite.calibration}
    return [
        Change(f"{suite._file}: ", (section, key), value)
        for section, values in sections.items()
        if values is not None
        for key, value in values.model_dump(exclude_unset=True).items()
    ]


def _entry_changes(entry: SuiteEntry, origin: str) -> list[Change]:
    return [Change(origin, parse_key(key, origin.rstrip(": ")), value) for key, value in entry.set.items()]


def _fits(change: Change, raw: dict[str, Any]) -> bool:
    """Whether a setting of the command line concerns this recipe of a suite."""
    method = raw.get("method")
    if change.path[0] != "method" or len(change.path) == 1 or not isinstance(method, dict):
        return True
    known = METHODS.get(str(method.get("name")))
    return known is None or change.path[1] in known.model_fields
