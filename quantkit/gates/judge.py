"""Holds the rows of a results file against bars: a gate fails only when the measurement is sure that it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from quantkit.bench.measurement import Results
from quantkit.errors import GateError, UsageError
from quantkit.gates.outcome import BarName, GateOutcome, Verdict
from quantkit.report.certainty import interval
from quantkit.report.comparison import compare
from quantkit.report.entries import UNITS, number, quantity
from quantkit.report.model import Cell, Line
from quantkit.sections import GateSection


@dataclass(frozen=True)
class Bar:
    """key: of the column that is held against it. side: whether it is the least or the most that will do."""

    key: str
    side: Literal["min", "max"]
    title: str
    unit: str


BARS: dict[BarName, Bar] = {
    "min_recovery": Bar("recovered", "min", "accuracy recovered", "fraction"),
    "max_kl": Bar("kl", "max", "KL to baseline", "nats"),
    "max_bytes": Bar("artifact", "max", "artifact", "bytes"),
    "min_speedup": Bar("decode_speedup", "min", "decode vs baseline", "x"),
}


def judge(results: Results, sections: Sequence[GateSection]) -> list[GateOutcome]:
    """Every bar of every section against every row that it names, or against all.

    A bar fails when the whole interval is beyond it or the figure was not measured; it warns when the interval holds
    the bar or there is none. Raises UsageError for a row that the results do not have.
    """
    lines = compare([results])[0].lines[1:]
    known = [line.label for line in lines]
    unknown = [section.row for section in sections if section.row is not None and section.row not in known]
    if unknown:
        raise UsageError(f'{results.name}: no row "{unknown[0]}"; it has {", ".join(known) or "none"}')
    return [
        _judged(name, limit, line)
        for section in sections
        for line in lines
        if section.row in (None, line.label)
        for name, limit in section.bars().items()
    ]


def _judged(name: BarName, limit: float, line: Line) -> GateOutcome:
    bar = BARS[name]
    cell = line.cells.get(bar.key, Cell(missing="not measured"))
    found = interval(bar.key, cell)
    low, high = found or (None, None)
    verdict, reason = _verdict(bar, limit, cell, found)
    outcome = GateOutcome(
        row=line.label,
        bar=name,
        limit=limit,
        value=cell.value,
        low=low,
        high=high,
        verdict=verdict,
        reason=reason,
        sentence="",
    )
    said = f"{line.label}: {bar.title} {measured(outcome)}, bar {at(outcome)}: {reason}"
    return outcome.model_copy(update={"sentence": said})


def _verdict(bar: Bar, limit: float, cell: Cell, found: tuple[float, float] | None) -> tuple[Verdict, str]:
    if cell.value is None:
        return "failed", f"not measured: {cell.missing or 'no reason was recorded'}"
    if found is None:
        return "warned", "measured once, or without an error: nothing says how sure it is"
    # turned so that more is better, whichever side the bar is on
    low, high, least = (*found, limit) if bar.side == "min" else (-found[1], -found[0], -limit)
    if high < least:
        return "failed", "the whole interval is beyond the bar"
    if low < least:
        return "warned", "the interval holds the bar: more questions, text or rounds would tell"
    return "passed", "the whole interval is within the bar"


def measured(outcome: GateOutcome) -> str:
    """The value with its interval and unit, or n/a."""
    bar = BARS[outcome.bar]
    if outcome.value is None:
        return "n/a"
    if outcome.low is None or outcome.high is None or outcome.low == outcome.high:
        return quantity(outcome.value, bar.unit)
    ends = f"[{number(outcome.low, bar.unit)}, {number(outcome.high, bar.unit)}]"
    return f"{number(outcome.value, bar.unit)} {ends} {UNITS.get(bar.unit, bar.unit)}".rstrip()


def at(outcome: GateOutcome) -> str:
    """The bar itself, such as "at most 90.0 MB"."""
    bar = BARS[outcome.bar]
    return f"at {'least' if bar.side == 'min' else 'most'} {quantity(outcome.limit, bar.unit)}"


def warnings(outcomes: Sequence[GateOutcome]) -> list[str]:
    """A line for each gate that warns."""
    return [f"warning: {outcome.sentence}" for outcome in outcomes if outcome.verdict == "warned"]


def failure(outcomes: Sequence[GateOutcome]) -> GateError | None:
    """The error of the gates that failed, all of them, None when none did."""
    failed = [outcome.sentence for outcome in outcomes if outcome.verdict == "failed"]
    count = f"{len(failed)} of {len(outcomes)} gates failed"
    return GateError("\n".join([count, *failed])) if failed else None
