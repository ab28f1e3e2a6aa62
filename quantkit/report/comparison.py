"""From the measurements in result files to the lines of a comparison; knows nothing of how they are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from quantkit.bench.measurement import Results, Row
from quantkit.report.cells import by_key, row_cells, task_of
from quantkit.report.facts import load_facts
from quantkit.report.model import Cell, Column, Comparison, Line
from quantkit.report.verdicts import applies, judge

Group = Literal["size", "speed", "quality"]

USUAL: dict[str, tuple[str, str, Group]] = {
    "artifact": ("artifact", "bytes", "size"),
    "memory_saved": ("saved", "fraction", "size"),
    "bits_per_weight": ("bits/weight, quantized", "bits/weight", "size"),
    "bits_per_weight_all": ("bits/weight, all", "bits/weight", "size"),
    "loaded": ("loaded", "bytes", "size"),
    "peak_rss": ("peak RSS", "bytes", "size"),
    "peak_vram": ("peak VRAM", "bytes", "size"),
    "quantize": ("time to quantize", "s", "size"),
    "load": ("time to load", "s", "speed"),
    "prefill": ("prefill", "tok/s", "speed"),
    "prefill_speedup": ("prefill vs baseline", "x", "speed"),
    "decode": ("decode", "tok/s", "speed"),
    "decode_speedup": ("decode vs baseline", "x", "speed"),
    "first_token": ("first token", "s", "speed"),
    "token_time": ("time per token", "s", "speed"),
    "energy": ("energy, decode", "J/tok", "speed"),
    "draft_speedup": ("baseline with this draft", "x", "speed"),
    "acceptance": ("drafted tokens accepted", "fraction", "speed"),
    "prefill_cost": ("cost, prompt", "per M tokens", "speed"),
    "decode_cost": ("cost, generated", "per M tokens", "speed"),
    "perplexity": ("perplexity", "", "quality"),
    "kl": ("KL to baseline", "nats", "quality"),
    "kl_p95": ("KL, 95th percentile", "nats", "quality"),
    "kl_p99_9": ("KL, 99.9th percentile", "nats", "quality"),
    "top1": ("top-1 agreement", "fraction", "quality"),
    "tv": ("total variation", "fraction", "quality"),
}
"""Title, unit and group of the usual metrics, in the order of their columns; any other metric gets a column as well."""

DERIVED = {"recovered": "recovered accuracy [95%]", "changed": "answers scored differently"}
"""Columns that stand behind the tasks they are made from."""

LOWER_IS_BETTER = frozenset(
    ("artifact", "bits_per_weight", "bits_per_weight_all", "loaded", "peak_rss", "peak_vram", "quantize", "first_token")
    + ("token_time", "energy", "prefill_cost", "decode_cost")
    + ("perplexity", "kl", "kl_p95", "kl_p99_9", "tv", "changed")
)
HIGHER_IS_BETTER = frozenset(
    ("memory_saved", "prefill", "prefill_speedup", "decode", "decode_speedup", "top1", "recovered")
    + ("draft_speedup", "acceptance")
)
"""Accuracy of a task besides. What stands in neither is never marked as the best."""

SAME = 1e-9
"""Below this relative difference two baselines computed the same thing: what is left is the rounding of JSON."""


def compare(results: Sequence[Results], *, price_per_hour: float | None = None) -> list[Comparison]:
    """Results of one model, machine and baseline become one comparison, the others one each, in the given order.

    price_per_hour: of the machine; every rate then has a cost beside it.
    """
    groups: list[list[Results]] = []
    for result in results:
        home = next((group for group in groups if mergeable(group[0], result)), None)
        if home is None:
            groups.append([result])
        else:
            home.append(result)
    return [_comparison(group, price_per_hour) for group in groups]


def mergeable(one: Results, other: Results) -> bool:
    """Whether rows of both belong into one table: same model, machine and settings, and the same baseline.

    Speeds and memory of the two baselines may differ as repetitions do; what is computed from the weights may not.
    """
    if one.model != other.model or one.environment != other.environment or one.settings != other.settings:
        return False
    ours, theirs = _computed(one.baseline), _computed(other.baseline)
    return ours.keys() == theirs.keys() and all(math.isclose(ours[key], theirs[key], rel_tol=SAME) for key in ours)


def _computed(row: Row) -> dict[str, float]:
    """What a repetition of the measurement would give again."""
    return {
        key: found.value
        for key, found in by_key(row).items()
        if found.value is not None and (found.metric in ("artifact", "perplexity") or task_of(found.metric))
    }


def _comparison(group: Sequence[Results], price_per_hour: float | None) -> Comparison:
    first = group[0]
    baseline = _line(first.baseline, first.baseline, first.baseline.label, price_per_hour)
    lines = [baseline]
    for result in group:
        for row in result.rows:
            label = _label(row, result, {line.label for line in lines})
            lines.append(_line(row, result.baseline, label, price_per_hour))
    notes: list[str] = []
    if len(group) > 1:
        notes.append(
            f"from {len(group)} result files ({', '.join(result.name for result in group)}); the baseline's line is "
            "that of the first, and every ratio is taken against the baseline measured in the same file"
        )
    if sum(line.cells["quantize"].value is not None for line in lines[1:]) > 1:
        notes.append("time to quantize: recipes that share a pass over the model each count the whole pass")
    if price_per_hour is not None:
        notes.append(f"costs: at {price_per_hour:g} an hour of a machine that does nothing else, in the same currency")
    notes += [f"gate {gate.verdict}: {gate.sentence}" for result in group for gate in result.gates]
    rules = load_facts().rules
    verdicts = [
        verdict
        for line in lines[1:]
        if (rule := rules.get(line.method_name or "")) is not None and applies(rule, line)
        for verdict in judge(line, baseline, rule, first.environment)
    ]
    return Comparison(
        name=first.name,
        model=first.model,
        model_notes=tuple(dict.fromkeys(note for result in group for note in result.model_notes)),
        columns=_columns(group, lines),
        lines=tuple(lines),
        verdicts=tuple(verdicts),
        notes=tuple(notes),
        price_per_hour=price_per_hour,
        settings=first.settings,
        environment=first.environment,
    )


def _label(row: Row, result: Results, taken: set[str]) -> str:
    candidates = (row.label, f"{row.label} ({result.name})", *(f"{row.label} ({n})" for n in range(2, len(taken) + 3)))
    return next(label for label in candidates if label not in taken)


def _line(row: Row, baseline: Row, label: str, price_per_hour: float | None) -> Line:
    facts = load_facts()
    return Line(
        label=label,
        baseline=row is baseline,
        artifact=row.artifact,
        method=row.method,
        method_name=row.method_name,
        format=row.format,
        runs_on=facts.runs_on.get("baseline" if row is baseline else row.format or ""),
        fits_best=facts.fits_best.get(row.method_name or ""),
        cells=row_cells(row, baseline, price_per_hour=price_per_hour),
        fallbacks=tuple(row.fallbacks),
        notes=tuple(row.notes),
        recipe=row.recipe,
        layers=tuple(row.layers),
    )


def _columns(group: Sequence[Results], lines: Sequence[Line]) -> tuple[Column, ...]:
    """A column for every key that some line has: the usual ones first, then tasks, recovered accuracy, the unknown."""
    measured = {
        key: found for result in group for row in (result.baseline, *result.rows) for key, found in by_key(row).items()
    }
    keys = dict.fromkeys(key for line in lines for key in line.cells)
    order = [*USUAL, "tasks", *DERIVED, "unknown"]

    def place(key: str) -> tuple[int, int]:
        metric, batch = _parts(key)
        known = next((name for name in (metric, _of_length(metric)[0]) if name in order), None)
        known = known or ("tasks" if task_of(metric) else "unknown")
        return batch, order.index(known)

    return tuple(_column(key, measured[key].unit if key in measured else None) for key in sorted(keys, key=place))


def _parts(key: str) -> tuple[str, int]:
    """The metric and the batch size of a column's key, such as "decode@4"."""
    metric, _, batch = key.partition("#")[0].partition("@")
    return metric, int(batch or 1)


def _of_length(metric: str) -> tuple[str, str]:
    """A metric such as "prefill/512" as its name and the prompt length, "" where there is none."""
    base, _, length = metric.partition("/")
    return (base, length) if length.isdigit() else (metric, "")


def _column(key: str, unit: str | None) -> Column:
    metric, batch = _parts(key)
    base, length = _of_length(metric)
    higher = base in HIGHER_IS_BETTER or task_of(metric) is not None
    better: Literal["lower", "higher"] | None = "higher" if higher else "lower" if base in LOWER_IS_BETTER else None
    if base in USUAL:
        title, usual_unit, group = USUAL[base]
        title = f"{title}, {length} tokens" if length else title
        title = title if batch == 1 else f"{title}, batch {batch}"
        return Column(key=key, title=title, unit=unit or usual_unit, group=group, better=better)
    if metric in DERIVED:
        return Column(key=key, title=DERIVED[metric], unit="fraction", group="quality", better=better)
    return Column(key=key, title=task_of(metric) or metric, unit=unit or "", group="quality", better=better)


def _follows(key: str, line: Line) -> bool:
    """Whether a ratio or cost is missing only because the speed it is made from is missing, which is told already."""
    made_from = key.replace("_speedup", "").replace("_cost", "")
    speed = line.cells.get(made_from) if made_from != key else None
    return speed is not None and speed.value is None


def missing_reasons(comparison: Comparison) -> dict[str, list[tuple[str, str]]]:
    """{reason: [(line's label, column's title)]} for every cell that has no number, in the order of the table."""
    reasons: dict[str, list[tuple[str, str]]] = {}
    for line in comparison.lines:
        for column in comparison.columns:
            cell: Cell | None = line.cells.get(column.key)
            if cell is not None and cell.value is None and not _follows(column.key, line):
                reasons.setdefault(cell.missing or "no reason was recorded", []).append((line.label, column.title))
    return reasons
