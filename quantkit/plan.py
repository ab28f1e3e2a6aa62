"""What a recipe will do to each linear of a model, and whether it can: from the recipe and the headers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import RecipeError
from quantkit.formats.base import LinearPlan, calibrates
from quantkit.formats.imatrix import read_imatrix
from quantkit.maths.gram import Importance
from quantkit.methods.base import Method
from quantkit.model.blocks import architecture_of, blocks_of, context_length, linear_shape
from quantkit.model.gguf_config import family_of_config
from quantkit.model.gguf_names import to_gguf
from quantkit.model.source import Source
from quantkit.recipe import Recipe

GROUP_SIZES = (256, 128, 64, 32, 16)
"""What the readers of grouped files have kernels for, the largest first."""
SHOWN = 12


def plan_linears(recipe: Recipe, source: Source) -> list[LinearPlan]:
    """The method of every linear, the head included when it has a tensor of its own, in file order."""
    plans = []
    for block in blocks_of(source):
        for linear in block.linears:
            out_features, in_features = linear_shape(source, linear)
            plans.append(LinearPlan(linear, out_features, in_features, _placed(recipe, linear, source)))
    head = architecture_of(source.config).head
    if not source.tied_head:
        out_features, in_features = source.shape(f"{head}.weight")
        plans.append(LinearPlan(head, out_features, in_features, _placed(recipe, head, source)))
    return plans


def _placed(recipe: Recipe, linear: str, source: Source) -> Method | None:
    method = recipe.method_for(linear)
    return None if method is None else method.placed(linear, source, recipe.calibration)


def check_plans(label: str, recipe: Recipe, source: Source, plans: Sequence[LinearPlan]) -> None:
    """Refuse a recipe that does not fit the model, all offending layers at once. Raises RecipeError."""
    problems, hint = problems_of_plans(label, recipe, source, plans)
    if problems:
        total = len(problems)
        if total > SHOWN:
            problems = [*problems[:SHOWN], f"... and {total - SHOWN} more"]
        raise RecipeError.from_problems(problems, hint)


def unmatched(label: str, recipe: Recipe, source: Source) -> list[str]:
    """A line for each pattern of a recipe that no linear of the model has in its name, which may be a slip."""
    architecture = architecture_of(source.config)
    names = [architecture.head, *(linear for block in blocks_of(source) for linear in block.linears)]
    patterns = [("overrides", pattern) for pattern in recipe.overrides] + [("skip", pattern) for pattern in recipe.skip]
    return [
        f"{label}: {key}: {pattern}: no linear of the model has such a name"
        for key, pattern in patterns
        if not any(re.search(pattern, name) for name in names)
    ]


def check_length(label: str, recipe: Recipe, source: Source, plans: Sequence[LinearPlan]) -> None:
    """Refuse calibration on texts longer than the model has positions for. Raises RecipeError."""
    length, context = recipe.calibration.length, context_length(source.config)
    if context and length > context and calibrates(plans):
        raise RecipeError(
            f"{label}: calibration.length: found {length}, expected at most the model's {context} positions",
            hint=f"--set calibration.length={context}",
        )


def problems_of_plans(
    label: str, recipe: Recipe, source: Source, plans: Sequence[LinearPlan]
) -> tuple[list[str], str | None]:
    """Every reason why a recipe does not fit a model, one line each, and what would fit."""
    problems = []
    if architecture_of(source.config).transposed and recipe.resolved_format.name != "gguf":
        conv = (
            f"{label}: format {recipe.resolved_format.name}: {source.config['architectures'][0]} keeps its linears as "
            "Conv1D, which only GGUF stores here"
        )
        return [conv], "take a recipe with method ggml"
    for plan in plans:
        if plan.method is None:
            continue
        reason = plan.method.misfit(plan.out_features, plan.in_features)
        if reason:
            problems.append(f"{label}: {plan.name}: {reason}")
    hint = None
    if problems:
        hint = _fitting_hint(recipe.method, [plan for plan in plans if plan.method is not None])
    else:
        problems = [f"{label}: {line}" for line in recipe.resolved_format.misfits(list(plans), source)]
    head = architecture_of(source.config).head
    for plan in plans:
        if plan.name == head and plan.method is not None and not plan.method.head:
            problems.append(f"{label}: {head}: {plan.method.name} quantizes decoder blocks only; keep {head} in skip")
    if not problems and all(plan.method is None for plan in plans):
        problems = [f"{label}: skip: every linear of the model is skipped, so there is nothing to quantize"]
    return problems, hint


def _fitting_hint(method: Method, plans: Sequence[LinearPlan]) -> str:
    """Which group sizes would fit every linear."""
    if getattr(method, "group_size", None) is None:
        return "skip these layers, or choose a method that takes their shape"
    fitting = [size for size in GROUP_SIZES if all(plan.in_features % size == 0 for plan in plans)]
    if not fitting:
        return "no usual group size divides every layer: --set method.group_size=null takes whole rows"
    shown = " or ".join(str(size) for size in fitting[:2])
    return f"a group size of {shown} fits every layer: --set method.group_size={fitting[0]}"


def given_importance(label: str, source: Source, plans: Sequence[LinearPlan]) -> dict[str, Importance]:
    """{linear: importance of its columns} from the imatrix file that a recipe names. Raises RecipeError, ModelError.

    Linears that the file does not know are left out. Empty when no file is named.
    """
    named = {plan.name: plan for plan in plans if isinstance(getattr(plan.method, "importance", None), str)}
    found: dict[str, Importance] = {}
    problems = []
    for path in {plan.method.importance for plan in named.values() if plan.method is not None}:
        matrix = read_imatrix(Path(path))
        family = family_of_config(source.config)
        known = {name: matrix.entries.get(to_gguf(f"{name}.weight", family) or "") for name in named}
        if not any(known.values()):
            problems.append(f"{label}: method.importance: {path} knows none of the model's tensors")
        for name, entry in known.items():
            if entry is None:
                continue
            if entry.squares.numel() != named[name].in_features:
                problems.append(
                    f"{label}: method.importance: {path} has {entry.squares.numel()} columns for {name}, "
                    f"expected {named[name].in_features}"
                )
            found[name] = entry
    if problems:
        raise RecipeError.from_problems(problems[:SHOWN], "it must be an importance matrix of this model")
    return found


def importance_files(plans: Sequence[LinearPlan]) -> list[Path]:
    """The imatrix files that a recipe names."""
    named = {getattr(plan.method, "importance", None) for plan in plans}
    return [Path(path) for path in sorted(path for path in named if isinstance(path, str))]
