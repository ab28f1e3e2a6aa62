"""Two results files, the last release against this one: row by row, metric by metric, as far as the intervals tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from quantkit.bench.measurement import Measurement, Results, Row
from quantkit.errors import DataError, GateError
from quantkit.report.cells import by_key
from quantkit.report.certainty import difference
from quantkit.report.comparison import compare
from quantkit.report.entries import number, quantity
from quantkit.report.layout import Document, Listing, TextTable
from quantkit.report.model import Cell, Column, Comparison, Line
from quantkit.schema import Frozen

Judgement = Literal["better", "worse", "same", "cannot tell"]

OF_THE_MACHINE = ("loaded", "peak_rss", "peak_vram", "quantize")
"""Metrics outside the group of speeds that are the machine's as much as the artifact's."""

MACHINE = ("platform", "cpu", "gpu", "cores", "threads", "device")
"""Keys of the environment without which times and memory of two runs say nothing of each other."""

MADE_FROM = {"memory_saved": "artifact", "decode_speedup": "decode", "prefill_speedup": "prefill"}
BESIDE_THE_POINT = ("imports_bytes", "warmup", "repetitions")
"""Settings that may differ: they do not change what is measured."""


class Change(Frozen):
    """One metric of one row in both files. low, high: the interval of after - before."""

    row: str
    baseline: bool
    metric: str
    title: str
    unit: str
    before: float | None
    after: float | None
    low: float | None = None
    high: float | None = None
    judgement: Judgement
    reason: str


class Differences(Frozen):
    """What changed between two results files. gone, new: labels of rows that only one of them has."""

    before: str
    after: str
    changes: list[Change]
    gone: list[str]
    new: list[str]


def compare_runs(before: Results, after: Results) -> Differences:
    """Every metric that a row has in either file. Raises DataError when they are of different models."""
    names = [results.model.rpartition("/")[2] for results in (before, after)]
    if names[0] != names[1]:
        raise DataError(f"results of different models: {before.model} and {after.model}", hint="bench the same model")
    ours, theirs = compare([after])[0], compare([before])[0]
    machine = [key for key in MACHINE if before.environment.get(key) != after.environment.get(key)]
    lines = {line.label: line for line in theirs.lines}
    earlier = {row.label: row for row in (before.baseline, *before.rows)}
    later = {row.label: row for row in (after.baseline, *after.rows)}
    changes = []
    for line in ours.lines:
        if line.label in lines:
            apart = _measured_otherwise(earlier.get(line.label), later.get(line.label), before, after)
            changes += _changes(lines[line.label], line, _columns(theirs, ours), apart, machine)
    now = [line.label for line in ours.lines]
    return Differences(
        before=before.name,
        after=after.name,
        changes=changes,
        gone=[label for label in lines if label not in now],
        new=[label for label in now if label not in lines],
    )


def _columns(*comparisons: Comparison) -> list[Column]:
    return list({column.key: column for comparison in comparisons for column in comparison.columns}.values())


def _changes(
    before: Line, after: Line, columns: Sequence[Column], apart: Mapping[str, str], machine: Sequence[str]
) -> list[Change]:
    found = []
    for column in columns:
        old, new = before.cells.get(column.key), after.cells.get(column.key)
        if (old is None or old.value is None) and (new is None or new.value is None):
            continue
        old, new = old or Cell(missing="not measured"), new or Cell(missing="not measured")
        limits = difference(column.key, old, new)
        judgement, reason = _judge(column, old, new, limits, apart, machine)
        found.append(
            Change(
                row=after.label,
                baseline=after.baseline,
                metric=column.key,
                title=column.title,
                unit=column.unit,
                before=old.value,
                after=new.value,
                low=limits[0] if limits else None,
                high=limits[1] if limits else None,
                judgement=judgement,
                reason=reason,
            )
        )
    return found


def _judge(
    column: Column,
    old: Cell,
    new: Cell,
    limits: tuple[float, float] | None,
    apart: Mapping[str, str],
    machine: Sequence[str],
) -> tuple[Judgement, str]:
    metric = column.key.partition("#")[0].partition("@")[0]
    base, slash, length = metric.partition("/")
    if old.value is None or new.value is None:
        when = "before" if old.value is None else "now"
        return "cannot tell", f"not measured {when}: {(old if old.value is None else new).missing or 'no reason given'}"
    made_from = MADE_FROM.get(base, base) + slash + length
    if made_from in apart:
        return "cannot tell", apart[made_from]
    if machine and (column.group == "speed" or metric in OF_THE_MACHINE):
        return "cannot tell", f"measured on another machine: {', '.join(machine)}"
    if old.value == new.value:
        return "same", "the very same number"
    if column.better is None:
        return "cannot tell", "more may be better or worse"
    if limits is None:
        return "cannot tell", "measured once: nothing says how sure it is"
    if limits[0] <= 0 <= limits[1]:
        return "cannot tell", "the interval of the difference holds 0"
    grew, wanted = limits[0] > 0, column.better == "higher"
    return "better" if grew == wanted else "worse", "the interval of the difference excludes 0"


def _measured_otherwise(old: Row | None, new: Row | None, before: Results, after: Results) -> dict[str, str]:
    """{metric: why its two figures are not of the same thing}, of a row; recovered accuracy is as its tasks are."""
    if old is None or new is None:
        return {}
    reasons = {}
    for key, now in by_key(new).items():
        then = by_key(old).get(key)
        reason = None if then is None else _otherwise(then, now)
        if reason:
            reasons[now.metric] = reason
            if now.metric.startswith("accuracy/"):
                reasons |= {"recovered": f"{now.metric}: {reason}", "changed": f"{now.metric}: {reason}"}
    tasks = [{m.metric for m in results.baseline.measurements if "/" in m.metric} for results in (before, after)]
    if tasks[0] != tasks[1]:
        reasons |= dict.fromkeys(("recovered", "changed"), "taken over other tasks")
    return reasons


def _otherwise(then: Measurement, now: Measurement) -> str | None:
    if then.metrics_version != now.metrics_version:
        return f"the definition changed: metrics_version {then.metrics_version} before, {now.metrics_version} now"
    if then.engine != now.engine:
        return f"computed by {then.engine} before, by {now.engine} now"
    keys = (then.settings.keys() | now.settings.keys()) - set(BESIDE_THE_POINT)
    other = sorted(key for key in keys if then.settings.get(key) != now.settings.get(key))
    return f"measured with another {', '.join(other)}" if other else None


def worse(differences: Differences) -> GateError | None:
    """The error that `--fail-on-worse` ends with, None when no artifact got worse; the baseline's speed is no gate."""
    lines = [f"{it.row}: {_line(it)}" for it in differences.changes if it.judgement == "worse" and not it.baseline]
    return GateError("\n".join(["worse than before", *lines])) if lines else None


def document(differences: Differences) -> Document:
    """What got better or worse as tables; of the rest, what could not be told and why."""
    headers = ["", "metric", "before", "now", "difference [95%]"]
    parts: list[TextTable | Listing] = []
    for judgement, title in (("worse", "Worse"), ("better", "Better")):
        chosen = [it for it in differences.changes if it.judgement == judgement]
        rows = [[it.row, it.title, *_values(it), _apart(it)] for it in chosen]
        parts += [TextTable(title, headers, rows, frozenset(range(len(headers))))] if rows else []
    unclear: dict[str, list[str]] = {}
    for it in differences.changes:
        if it.judgement == "cannot tell":
            before, now = _values(it)
            unclear.setdefault(it.reason, []).append(f"{it.row}, {it.title}: {before} to {now}")
    parts += [Listing(f"Cannot tell: {reason}", items) for reason, items in unclear.items()]
    same = sum(it.judgement == "same" for it in differences.changes)
    lead = [f"{same} figures are the very same."] if same else []
    lead += [f"Only before: {', '.join(differences.gone)}."] if differences.gone else []
    lead += [f"Only now: {', '.join(differences.new)}."] if differences.new else []
    return Document(f"{differences.before} to {differences.after}", lead, parts)


def show(differences: Differences) -> None:
    """Print the tables on stdout."""
    from quantkit.report.screen import show_documents

    show_documents([document(differences)])


def _line(change: Change) -> str:
    before, now = _values(change)
    return f"{change.title} {before} to {now}, difference {_apart(change)}"


def _values(change: Change) -> tuple[str, str]:
    before, now = ("n/a" if value is None else quantity(value, change.unit) for value in (change.before, change.after))
    return before, now


def _apart(change: Change) -> str:
    if change.before is None or change.after is None:
        return "n/a"
    shown = _signed(change.after - change.before, change.unit)
    if change.low is None or change.high is None or change.low == change.high:
        return shown
    return f"{shown} [{_signed(change.low, change.unit)}, {_signed(change.high, change.unit)}]"


def _signed(value: float, unit: str) -> str:
    text = number(value, unit)
    return f"+{text}" if value > 0 else text
