"""What is checked of jobs before any work: that recipes fit the model, and that outputs may be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.card import card_files
from quantkit.errors import RecipeError
from quantkit.manifest import MANIFEST_NAME
from quantkit.model.config_fit import check_config_fits, check_head_fits
from quantkit.model.source import Source
from quantkit.one_block import Job
from quantkit.output import check_folder, check_output
from quantkit.place import partial_folder, refuse_conflicts
from quantkit.plan import check_length, check_plans, given_importance, importance_files, plan_linears, unmatched
from quantkit.planning.verdicts import check_target
from quantkit.progress import Progress
from quantkit.recipe import Recipe


@dataclass(frozen=True)
class Checked:
    """Jobs that can be done. needed_bytes: of their artifacts. names: {label: files that an artifact will have}, where
    a user's may be in the way."""

    all: Sequence[Job]
    needed_bytes: int
    names: Mapping[str, Sequence[str]]


def checked(wanted: Sequence[tuple[str, Recipe, Path]], source: Source, *, force: bool, progress: Progress) -> Checked:
    """The jobs of recipes by label and output. Raises RecipeError with what is wrong with any of them, UsageError for
    an output that may not be written, ModelError for a checkpoint that is not of its config."""
    folders = [folder for _, _, folder in wanted]
    twice = {str(folder) for folder in folders if folders.count(folder) > 1}
    if twice:
        raise RecipeError(
            f"two recipes write to {', '.join(sorted(twice))}", hint="give their suite entries different labels"
        )
    check_config_fits(source)
    jobs: list[Job] = []
    problems: list[RecipeError] = []
    needed = 0
    names: dict[str, list[str]] = {}
    for label, recipe, folder in wanted:
        check_folder(folder)
        if not partial_folder(folder).is_dir():  # else what is there may be this command's own, see below
            check_output(folder, force=force)
        plans = plan_linears(recipe, source)
        try:
            check_plans(label, recipe, source, plans)
            check_length(label, recipe, source, plans)
            check_target(label, recipe, source, plans)
            importance = given_importance(label, source, plans)
        except RecipeError as error:
            problems.append(error)
            continue
        for line in unmatched(label, recipe, source):
            progress.say(f"note: {line}")
        layout = recipe.resolved_format.layout(source, plans, getattr(torch, recipe.model.dtype))
        if force and folder.is_dir():
            names[label] = [MANIFEST_NAME, *layout.name_files(), *card_files(source)]
            if not partial_folder(folder).is_dir():
                refuse_conflicts(folder, names[label])
        needed += layout.total_bytes
        jobs.append(Job(label, recipe, plans, folder, importance, importance_files(plans)))
    if problems:
        raise RecipeError.from_problems([error.message for error in problems], problems[0].hint)
    check_head_fits(source)
    return Checked(jobs, needed, names)
