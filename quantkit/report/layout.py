"""A comparison as words: tables of text, lists and footnotes, the same for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quantkit.report.comparison import missing_reasons
from quantkit.report.model import Cell, Column, Comparison, Line, Quantity, Verdict

SUMMARY = ("artifact", "memory_saved", "decode", "decode_speedup", "perplexity", "kl", "recovered", "quantize")
GROUPS = {"size": "Size and memory", "speed": "Speed", "quality": "Quality"}
SHORT = {"decode_speedup": "vs baseline", "recovered": "recovered [95%]", "kl": "KL", "quantize": "quantize"}
"""Titles for the summary, where there is little room."""

UNITS = {"bytes": "MB", "fraction": "%", "bits/weight": "bits", "x": "×"}
"""Unit of a measurement -> unit it is shown in."""


QUANTITIES: tuple[Quantity, ...] = ("accuracy kept", "memory saved", "faster")


@dataclass(frozen=True)
class TextTable:
    """headers and rows of one width; `left` names the columns that hold words."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    left: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Listing:
    title: str
    items: list[str]


@dataclass(frozen=True)
class Document:
    title: str
    lead: list[str]
    parts: list[TextTable | Listing]


@dataclass
class Footnotes:
    """Numbered remarks; the same text keeps its number."""

    texts: list[str] = field(default_factory=list)

    def marks(self, texts: Sequence[str]) -> str:
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
        numbers = sorted(self.texts.index(text) + 1 for text in texts)
        return f" [{','.join(map(str, numbers))}]" if numbers else ""


def lay_out(comparison: Comparison) -> Document:
    """Every table and note of a comparison, the one-table summary first."""
    notes = Footnotes()
    columns = {column.key: column for column in comparison.columns if _has_value(comparison, column.key)}
    summary = [columns[key] for key in SUMMARY if key in columns]
    parts: list[TextTable | Listing] = [_table("Summary", comparison.lines, summary, notes, short=True)]
    for group, title in GROUPS.items():
        chosen = [column for column in columns.values() if column.group == group]
        if chosen:
            parts.append(_table(title, comparison.lines, chosen, notes, engine=group != "size"))
    if comparison.verdicts:
        parts.append(_rule_table(comparison))
        parts += _partings(comparison.verdicts)
    parts.append(_use_table(comparison.lines))
    parts += [
        Listing("Notes", [f"[{number}] {text}" for number, text in enumerate(notes.texts, 1)]),
        Listing("Not measured", _not_measured(comparison)),
        Listing("Layers that did not get what the recipe asked", _fallbacks(comparison.lines)),
        Listing("Remarks", [*comparison.notes, *_by_line(comparison.lines, "notes")]),
        Listing("Settings", flatten(comparison.settings)),
        Listing("Environment", flatten(comparison.environment)),
    ]
    lead = [f"Model: {comparison.model}", *comparison.model_notes]
    lead.append(f"Baseline: {comparison.lines[0].label}. MB are 10^6 bytes.")
    kept = [part for part in parts if isinstance(part, TextTable) or part.items]
    return Document(comparison.name, lead, kept)


def _has_value(comparison: Comparison, key: str) -> bool:
    return any(line.cells[key].value is not None for line in comparison.lines if key in line.cells)


def _table(
    title: str,
    lines: Sequence[Line],
    columns: Sequence[Column],
    notes: Footnotes,
    *,
    short: bool = False,
    engine: bool = False,
) -> TextTable:
    headers = ["", *((SHORT.get(c.key, c.title) if short else c.title) + _unit(c) for c in columns)]
    rows = []
    for line in lines:
        label = line.label + (notes.marks(_not_as_asked(line)) if short else "")
        rows.append([label, *(show(line.cells.get(c.key), c, notes, brief=short) for c in columns)])
    if not engine:
        return TextTable(title, headers, rows)
    for line, row in zip(lines, rows, strict=True):
        row.append(", ".join(dict.fromkeys(e for c in columns if (e := _engine(line.cells.get(c.key))))) or "–")
    return TextTable(title, [*headers, "run by"], rows, frozenset({0, len(headers)}))


def _not_as_asked(line: Line) -> list[str]:
    """The remark on a line some of whose layers fell back, for the summary; what happened to each is listed below."""
    count = len(line.fallbacks)
    return [f"{count} layer{'s' * (count > 1)} did not get what the recipe asked: listed below"] if count else []


def _engine(cell: Cell | None) -> str | None:
    return cell.engine if cell is not None and cell.value is not None else None


def _in_milliseconds(column: Column) -> bool:
    return column.unit == "s" and column.key.startswith(("first_token", "token_time"))


def _unit(column: Column) -> str:
    if _in_milliseconds(column):
        return " ms"
    unit = UNITS.get(column.unit, column.unit)
    return f" {unit}" if unit and "bits/weight" not in column.title else ""


def show(cell: Cell | None, column: Column, notes: Footnotes, *, brief: bool = False) -> str:
    """A cell as text: value, then ± standard error, (interquartile range) or [interval], then footnote marks."""
    if cell is None:
        return "–"
    if cell.value is None:
        return "n/a" + notes.marks([cell.missing or "no reason was recorded"])
    scale = 1000 if _in_milliseconds(column) else 1

    def text(value: float) -> str:
        return number(value * scale, column.unit)

    shown = text(cell.value)
    if cell.low is not None and cell.high is not None:
        shown += f" [{text(cell.low)}, {text(cell.high)}]"
    elif cell.error is not None and not brief:
        shown += f" ± {text(cell.error)}"
    elif cell.spread is not None and not brief:
        shown += f" ({text(cell.spread)})"
    return shown + notes.marks(cell.remarks)


def number(value: float, unit: str) -> str:
    """A number in the unit it is shown in (see UNITS), with the digits that unit deserves, without the unit."""
    if unit == "bytes":
        megabytes = value / 1e6
        return f"{megabytes:.0f}" if abs(megabytes) >= 100 else f"{megabytes:.1f}"
    if unit == "fraction":
        return f"{100 * value:.1f}"
    if unit in ("tok/s", "s"):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
    if unit == "nats":
        return f"{value:.4f}"
    return f"{value:.2f}"


def _rule_table(comparison: Comparison) -> TextTable:
    found = {(verdict.label, verdict.quantity): verdict for verdict in comparison.verdicts}
    headers = ["", *(f"{quantity} %, {side}" for quantity in QUANTITIES for side in ("rule", "measured"))]
    rows = []
    for label in dict.fromkeys(verdict.label for verdict in comparison.verdicts):
        row = [label]
        for quantity in QUANTITIES:
            verdict = found[label, quantity]
            row += [_rule(verdict), _verdict_value(verdict)]
        rows.append(row)
    return TextTable("The rule of thumb beside the measurement", headers, rows)


def _rule(verdict: Verdict) -> str:
    low, high = 100 * verdict.rule_low, 100 * verdict.rule_high
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _verdict_value(verdict: Verdict) -> str:
    if verdict.measured is None:
        return "n/a"
    mark = {"agrees": "", "parts": " !", "cannot tell": " ?", "not measured": ""}[verdict.judgement]
    interval = ""
    if verdict.quantity == "accuracy kept" and verdict.low is not None and verdict.high is not None:
        interval = f" [{100 * verdict.low:.1f}, {100 * verdict.high:.1f}]"
    return f"{100 * verdict.measured:.1f}{interval}{mark}"


def _partings(verdicts: Sequence[Verdict]) -> list[Listing]:
    titles = {
        "parts": "Where measurement and folklore part (!)",
        "cannot tell": "Where the measurement cannot tell (?)",
        "not measured": "Rules that were not put to the test",
    }
    listings = []
    for judgement, title in titles.items():
        items = []
        for verdict in verdicts:
            if verdict.judgement != judgement:
                continue
            measured = "" if verdict.measured is None else f", measured {100 * verdict.measured:.1f}%"
            items.append(f"{verdict.label}, {verdict.quantity}: rule {_rule(verdict)}%{measured}: {verdict.reason}")
        listings.append(Listing(title, items))
    return listings


def _use_table(lines: Sequence[Line]) -> TextTable:
    rows = [
        [line.label, *(text or "–" for text in (line.method, line.format, line.runs_on, line.fits_best))]
        for line in lines
    ]
    headers = ["", "method", "format", "runs on", "fits best"]
    return TextTable("Where it runs and where it fits", headers, rows, frozenset(range(len(headers))))


def _not_measured(comparison: Comparison) -> list[str]:
    items = []
    for reason, cells in missing_reasons(comparison).items():
        titles: dict[str, list[str]] = {}
        for label, title in cells:
            titles.setdefault(label, []).append(title)
        lists = {", ".join(names) for names in titles.values()}
        if len(titles) == len(comparison.lines) and len(lists) == 1:
            where = f"every line: {lists.pop()}"
        else:
            where = "; ".join(f"{label}: {', '.join(names)}" for label, names in titles.items())
        items.append(f"{reason} ({where})")
    return items


def _by_line(lines: Sequence[Line], field_name: str) -> list[str]:
    return [f"{line.label}: {text}" for line in lines for text in getattr(line, field_name)]


def _fallbacks(lines: Sequence[Line]) -> list[str]:
    """What fell back in each line; layers that share what was done and why share an entry."""
    entries = []
    for line in lines:
        layers: dict[str, list[str]] = {}
        for text in line.fallbacks:
            name, _, what = text.partition(": ")
            layers.setdefault(what, []).append(name)
        for what, names in layers.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            entries.append(f"{line.label}: {names[0]}{more}: {what}")
    return entries


def flatten(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as lines such as "packages.torch: 2.13.0"; what is None is left out."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, dict):
            lines += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            for place, item in enumerate(value):
                lines += flatten(item if isinstance(item, dict) else {"": item}, f"{prefix}{key}.{place}.")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            lines.append(f"{prefix}{key}: {shown}")
    return lines
