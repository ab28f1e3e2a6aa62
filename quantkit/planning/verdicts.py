"""What each engine will make of an artifact that is planned: rules.yaml held against the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from quantkit.errors import RecipeError
from quantkit.formats.base import LinearPlan
from quantkit.formats.group import grid_of
from quantkit.model.blocks import blocks_of, heads_of
from quantkit.model.source import Source
from quantkit.planning.rules import VERDICTS, Engine, Verdict, When, engines
from quantkit.recipe import Recipe
from quantkit.tensors import Grid

LAYERS_NAMED = 3


class Reason(BaseModel):
    """A rule that applies. layers: the linears it is about, none when it is about the artifact."""

    verdict: Verdict
    why: str
    layers: list[str] = []
    hint: str | None = None
    source: str

    def text(self) -> str:
        """One line: why, and the first layers."""
        if not self.layers:
            return self.why
        shown, more = self.layers[:LAYERS_NAMED], len(self.layers) - LAYERS_NAMED
        return f"{self.why}: {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")


class EngineVerdict(BaseModel):
    """What one engine makes of the artifact, and why."""

    engine: str
    title: str
    verdict: Verdict
    reasons: list[Reason]
    source: str | None


@dataclass(frozen=True)
class _Linear:
    """One linear that is quantized, as an engine would hold it.

    rows: of all linears that read its input, which engines fuse. reads_split_input: tensor parallelism splits its
    columns rather than its rows.
    """

    name: str
    rows: int
    columns: int
    grid: Grid | None
    ggml_type: str | None
    reads_split_input: bool

    def shard(self, gpus: int) -> tuple[float, float]:
        """Rows and columns on each GPU."""
        if self.reads_split_input:
            return self.rows, self.columns / gpus
        return self.rows / gpus, self.columns


@dataclass(frozen=True)
class Facts:
    """What the conditions of rules are held against."""

    format: str
    method: str
    dtype: str
    heads: int
    gpus: int
    linears: tuple[_Linear, ...]

    @property
    def several_grids(self) -> bool:
        return len({linear.grid for linear in self.linears}) > 1


def facts_of(recipe: Recipe, source: Source, plans: Sequence[LinearPlan]) -> Facts:
    """The facts of a plan that fits its model."""
    config = source.config
    split = {
        name
        for block in blocks_of(source)
        for group in block.groups
        if group.producer_kind != "norm"  # reads what the heads or the inner channels made, which are spread
        for name in group.linears
    }
    fused = {name: group.linears for block in blocks_of(source) for group in block.groups for name in group.linears}
    rows = {plan.name: plan.out_features for plan in plans}
    linears = tuple(
        _linear(plan, sum(rows[name] for name in fused.get(plan.name, (plan.name,))), split=plan.name in split)
        for plan in plans
        if plan.method is not None
    )
    heads = heads_of(config)
    gpus = recipe.target.tensor_parallel if recipe.target is not None else 1
    return Facts(recipe.resolved_format.name, _name(recipe.method), recipe.model.dtype, heads, gpus, linears)


def _linear(plan: LinearPlan, rows: int, *, split: bool) -> _Linear:
    method: Any = plan.method
    ggml_type = method.type_for(plan.in_features) if method.name == "ggml" else None
    return _Linear(plan.name, rows, plan.in_features, grid_of(method), ggml_type, reads_split_input=split)


def _name(method: Any) -> str:
    return str(method.name)


def verdicts(facts: Facts) -> list[EngineVerdict]:
    """What every engine makes of it, in the order of the file."""
    return [verdict(engine, facts) for engine in engines()]


def verdict(engine: Engine, facts: Facts) -> EngineVerdict:
    """What one engine makes of it: the worst verdict of the rules that apply, `takes` when none does."""
    found = {"engine": engine.name, "title": engine.title}
    if facts.format not in engine.formats:
        told = engine.otherwise
        why = told.why if told else f"does not read {facts.format}; it reads {', '.join(engine.formats)}"
        origin = told.source if told else next(iter(engine.formats.values()))
        reason = Reason(verdict="refuses", why=why, source=origin)
        return EngineVerdict(**found, verdict="refuses", reasons=[reason], source=origin)
    reasons = []
    for rule in engine.rules:
        layers = _applies(rule.when, facts)
        if layers is not None:
            reasons.append(
                Reason(verdict=rule.verdict, why=rule.why, layers=layers, hint=rule.hint, source=rule.source)
            )
    reasons.sort(key=lambda reason: -VERDICTS.index(reason.verdict))
    worst = reasons[0].verdict if reasons else "takes"
    source = engine.formats[facts.format]  # type: ignore[index]  # looked up above
    return EngineVerdict(**found, verdict=worst, reasons=reasons, source=source)


def _applies(when: When, facts: Facts) -> list[str] | None:
    """The linears a rule is about, none when it is about the whole; None when it does not apply."""
    whole = (
        (when.format is None or facts.format in when.format)
        and (when.method is None or facts.method in when.method)
        and (when.dtype is None or facts.dtype in when.dtype)
        and (when.several_grids is None or facts.several_grids)
        and (when.several_gpus is None or facts.gpus > 1)
        and (when.heads_indivisible is None or facts.heads % facts.gpus != 0)
    )
    if not whole:
        return None
    if not _of_linears(when):
        return []
    layers = [linear.name for linear in facts.linears if _holds(when, linear, facts.gpus)]
    return layers or None


def _of_linears(when: When) -> bool:
    asked = when.model_dump(exclude_none=True)
    return bool(asked.keys() - {"format", "method", "dtype", "several_grids", "several_gpus", "heads_indivisible"})


def _holds(when: When, linear: _Linear, gpus: int) -> bool:
    """Whether the conditions on linears hold of one."""
    grid = linear.grid
    rows, columns = linear.shard(gpus)
    split = linear.reads_split_input and gpus > 1
    group = grid.group_size if grid is not None else None
    return (
        (when.bits is None or (grid is not None and grid.bits in when.bits))
        and (when.symmetric is None or (grid is not None and grid.symmetric == when.symmetric))
        and (when.group_size is None or (grid is not None and group in when.group_size))
        and (
            when.group_size_other_than is None
            or (grid is not None and grid.group_size not in when.group_size_other_than)
        )
        and (when.types is None or linear.ggml_type in when.types)
        and (when.group_straddles is None or (split and group is not None and columns % group != 0))
        and (when.row_is_split is None or (split and grid is not None and group is None))
        and (
            when.shard_shape_other_than is None
            or all(rows % high or columns % wide for high, wide in when.shard_shape_other_than)
        )
    )


def check_target(label: str, recipe: Recipe, source: Source, plans: Sequence[LinearPlan]) -> None:
    """Refuse a recipe whose artifact its `target` would refuse. Raises RecipeError."""
    if recipe.target is None:
        return
    engine = next(engine for engine in engines() if engine.name == recipe.target.engine)
    found = verdict(engine, facts_of(recipe, source, plans))
    refused = [reason for reason in found.reasons if reason.verdict == "refuses"]
    if refused:
        where = f"{label}: target: {engine.title}"
        where += f" on {recipe.target.tensor_parallel} GPUs" if recipe.target.tensor_parallel > 1 else ""
        hints = [reason.hint for reason in refused if reason.hint]
        raise RecipeError.from_problems(
            [f"{where} refuses this: {reason.text()} ({reason.source})" for reason in refused],
            "; ".join(dict.fromkeys(hints)) or f"quantkit plan {label} tells which engines take it",
        )
