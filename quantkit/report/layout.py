"""A comparison as words: tables, lists and footnotes, the same for the terminal, for Markdown and for HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.report.best import best_line
from quantkit.report.comparison import missing_reasons
from quantkit.report.entries import Entry, Footnotes, entries, shown_unit
from quantkit.report.layers import layer_table
from quantkit.report.model import Cell, Column, Comparison, Line, Quantity, Verdict

SUMMARY = ("artifact", "memory_saved", "decode", "decode_speedup", "perplexity", "kl", "recovered", "quantize")
GROUPS = {"size": "Size and memory", "speed": "Speed", "quality": "Quality"}
INTERVAL = "[95% interval; of a speed: where the median of another run would lie]"
SHORT = {"decode_speedup": "vs baseline", "recovered": "recovered [95%]", "kl": "KL", "quantize": "quantize"}
"""Titles for the summary, where there is little room."""

QUANTITIES: tuple[Quantity, ...] = ("accuracy kept", "memory saved", "faster")


@dataclass(frozen=True)
class TextTable:
    """headers and rows of one width; `left` names the columns that hold words; units: those at the headers' ends."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str | Entry]]
    left: frozenset[int] = frozenset({0})
    units: Sequence[str] = ()

    def column(self, place: int) -> list[Entry]:
        """The entries of one column."""
        cells = [row[place] for row in self.rows]
        return [Entry(cell) if isinstance(cell, str) else cell for cell in cells]

    @property
    def has_best(self) -> bool:
        return any(isinstance(cell, Entry) and cell.best for row in self.rows for cell in row)


@dataclass(frozen=True)
class Listing:
    title: str
    items: list[str]


@dataclass(frozen=True)
class Document:
    title: str
    lead: list[str]
    parts: list[TextTable | Listing]

    def best_note(self, mark: str) -> list[str]:
        """What the mark on a best number means, as a line of its own where some number has it."""
        if not any(isinstance(part, TextTable) and part.has_best for part in self.parts):
            return []
        return [f"{mark}: the best artifact of a column, when its interval is clear of every other's."]


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
    layers = layer_table(comparison.lines)
    if layers:
        headers, rows, units = layers
        parts.append(TextTable("Layers", headers, rows, frozenset({0, len(headers) - 1}), units))
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
    lead.append(f"Baseline: {comparison.lines[0].label}. MB are 10^6 bytes. {INTERVAL}.")
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
    titles = [SHORT.get(column.key, column.title) if short else column.title for column in columns]
    units = [_unit(column) for column in columns]
    headers = ["", *(" ".join(filter(None, pair)) for pair in zip(titles, units, strict=True))]
    labels = [Entry(line.label, marks=notes.marks(_not_as_asked(line)) if short else ()) for line in lines]
    filled = [
        entries([line.cells.get(c.key) for line in lines], c, notes, brief=short, best=best_line(lines, c))
        for c in columns
    ]
    rows: list[list[str | Entry]] = [list(row) for row in zip(labels, *filled, strict=True)]
    if not engine:
        return TextTable(title, headers, rows, units=["", *units])
    for line, row in zip(lines, rows, strict=True):
        row.append(", ".join(dict.fromkeys(e for c in columns if (e := _engine(line.cells.get(c.key))))) or "–")
    return TextTable(title, [*headers, "run by"], rows, frozenset({0, len(headers)}), ["", *units, ""])


def _not_as_asked(line: Line) -> list[str]:
    """The remark on a line some of whose layers fell back, for the summary; what happened to each is listed below."""
    count = len(line.fallbacks)
    return [f"{count} layer{'s' * (count > 1)} did not get what the recipe asked: listed below"] if count else []


def _engine(cell: Cell | None) -> str | None:
    return cell.engine if cell is not None and cell.value is not None else None


def _unit(column: Column) -> str:
    return "" if "bits/weight" in column.title else shown_unit(column)


def _rule_table(comparison: Comparison) -> TextTable:
    found = {(verdict.label, verdict.quantity): verdict for verdict in comparison.verdicts}
    headers = ["", *(f"{quantity} %, {side}" for quantity in QUANTITIES for side in ("rule", "measured"))]
    rows: list[list[str | Entry]] = []
    for label in dict.fromkeys(verdict.label for verdict in comparison.verdicts):
        row: list[str | Entry] = [label]
        for quantity in QUANTITIES:
            verdict = found[label, quantity]
            row += [_rule(verdict), _verdict_value(verdict)]
        rows.append(row)
    return TextTable("The rule of thumb beside the measurement", headers, rows)


def _rule(verdict: Verdict) -> str:
    low, high = 100 * verdict.rule_low, 100 * verdict.rule_high
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _verdict_value(verdict: Verdict) -> Entry:
    if verdict.measured is None:
        return Entry("n/a")
    mark = {"agrees": "", "parts": "!", "cannot tell": "?", "not measured": ""}[verdict.judgement]
    interval = ""
    if verdict.quantity == "accuracy kept" and verdict.low is not None and verdict.high is not None:
        interval = f"[{100 * verdict.low:.1f}, {100 * verdict.high:.1f}]"
    # a blank in place of a mark keeps intervals under each other
    behind = f"{interval} {mark or ' '}".lstrip() if interval or mark else ""
    return Entry(f"{100 * verdict.measured:.1f}", behind, order=verdict.measured)


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
