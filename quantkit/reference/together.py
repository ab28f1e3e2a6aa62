"""What the recipes of one comparison have in common: quantkit to run them, one model, one calibration, one text to be
judged on."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from quantkit.errors import RecipeError, UsageError
from quantkit.reference.engines import OWN
from quantkit.sections import CalibrationSection, DivergenceBench, Recipe, merge_override

IDS_KEYS = ("set", "sequences", "length", "seed")
"""Keys of the calibration section that decide its token ids; how they are multiplied stays a recipe's own."""

TEXT_KEYS = ("set", "sequences", "length")
"""Keys of a divergence bench."""


def check_engines(files: Sequence[str], engines: Sequence[str], limit_bytes: int | None) -> None:
    """Refuse further recipes and a limit of memory that no engine is given: only quantkit runs them, and under it.
    Raises UsageError."""
    if limit_bytes is not None and OWN not in engines:
        raise UsageError(
            f"--max-memory with --engines {','.join(engines)}: nothing would run under it, which is for {OWN}'s own "
            f"rows, expected {OWN} among the engines",
            hint=f"--engines {','.join([OWN, *engines])}, or leave --max-memory out",
        )
    if len(files) > 1 and OWN not in engines:
        raise UsageError(
            f"--engines {','.join(engines)}: nothing would run {', '.join(files[1:])}: recipes after the first are "
            f"{OWN}'s own rows, expected {OWN} among the engines",
            hint=f"--engines {','.join([OWN, *engines])}, or leave the further recipes out",
        )


def shared_sections(
    files: Sequence[str], recipes: Sequence[Recipe], model: str | None
) -> tuple[CalibrationSection | None, DivergenceBench | None]:
    """The calibration of all recipes, that of the first that has use for one, and their divergence bench, that of the
    first that has one; None when none has.

    files: what messages call the recipes. model: of the command line, which goes before those of all recipes. Raises
    RecipeError for every recipe that asks for another model, other token ids or another text to be judged on.
    """
    problems: list[str] = []
    remedies: dict[str, None] = {}
    if model is None and recipes[0].model.id is not None:
        for file, recipe in zip(files[1:], recipes[1:], strict=True):
            if recipe.model.id is not None:
                problems += _other_model(file, recipe, files[0], recipes[0], remedies)
    calibrated = [(file, recipe) for file, recipe in zip(files, recipes, strict=True) if calibrates(recipe)]
    for file, recipe in calibrated[1:]:
        problems += _other_ids(file, recipe, *calibrated[0], remedies)
    judged = [(file, found) for file, recipe in zip(files, recipes, strict=True) if (found := _divergence(recipe))]
    for file, found in judged[1:]:
        problems += _other_text(file, found, *judged[0], remedies)
    if problems:
        raise RecipeError.from_problems(
            problems, hint=f"make them the same, or give all of them {' '.join(remedies)}; or compare them one by one"
        )
    return calibrated[0][1].calibration if calibrated else None, judged[0][1] if judged else None


def calibrates(recipe: Recipe) -> bool:
    """Whether a recipe has use for a calibration set, for all linears or for some."""
    methods = [recipe.method, *(merge_override(recipe.method, settings) for settings in recipe.overrides.values())]
    return any(method is not None and method.calibrated for method in methods)


def _other_model(file: str, recipe: Recipe, first_file: str, first: Recipe, remedies: dict[str, None]) -> list[str]:
    given, wanted = recipe.model, first.model
    assert given.id is not None and wanted.id is not None
    if _place(given.id) != _place(wanted.id):
        remedies[f"--model {shlex.quote(wanted.id)}"] = None
        return [_problem(file, "model.id", given.id, first_file, wanted.id)]
    if given.revision != wanted.revision:
        remedies[f"--set model.revision={shlex.quote(wanted.revision)}"] = None
        return [_problem(file, "model.revision", given.revision, first_file, wanted.revision)]
    return []


def _other_ids(file: str, recipe: Recipe, first_file: str, first: Recipe, remedies: dict[str, None]) -> list[str]:
    problems = []
    for key, given, wanted in _differing(IDS_KEYS, recipe.calibration, first.calibration):
        remedies[f"--set calibration.{key}={shlex.quote(str(wanted))}"] = None
        problems.append(_problem(file, f"calibration.{key}", given, first_file, wanted))
    return problems


def _divergence(recipe: Recipe) -> DivergenceBench | None:
    return next((section for section in recipe.bench if isinstance(section, DivergenceBench)), None)


def _other_text(
    file: str, found: DivergenceBench, first_file: str, first: DivergenceBench, remedies: dict[str, None]
) -> list[str]:
    differing = _differing(TEXT_KEYS, found, first)
    if differing:  # the whole list: a recipe without an entry of that name has no place for a key of it
        setting = f"bench=[{json.dumps(first.model_dump(mode='json'))}]"
        remedies[f"--set {shlex.quote(setting)}"] = None
    return [_problem(file, f"bench.divergence.{key}", given, first_file, wanted) for key, given, wanted in differing]


def _differing(keys: Sequence[str], one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """The keys whose values differ between two sections, with both values."""
    pairs = [(key, getattr(one, key), getattr(other, key)) for key in keys]
    return [(key, a, b) for key, a, b in pairs if (_place(a) != _place(b) if key == "set" else a != b)]


def _problem(file: str, key: str, given: Any, first_file: str, wanted: Any) -> str:
    what = {"model": "model", "calibration": "calibration", "bench": "text to judge by"}[key.split(".")[0]]
    return f"{file}: {key}: found {given}, expected {wanted} as in {first_file}: a comparison has one {what}"


def _place(name: str) -> str:
    """A name or a path, however it is spelled."""
    return os.path.normpath(os.path.expanduser(name))
