"""Cells as text, in the parts that line up: a value with the decimals of its column, its uncertainty, its footnotes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantkit.report.model import Cell, Column

UNITS = {"bytes": "MB", "fraction": "%", "bits/weight": "bits", "x": "×"}
"""Unit of a measurement -> unit it is shown in."""

FACTORS = {"bytes": 1e-6, "fraction": 100.0}
MILLISECONDS = ("first_token", "token_time")
"""Metrics in seconds that are shown in milliseconds."""

DECIMALS = {"fraction": 1, "nats": 4, "bits/weight": 2, "x": 2, "J/tok": 4, "": 2}
"""Where what deserves to be read does not depend on the size of the number."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table: text, what stands behind it, numbers of footnotes, and by what it is sorted."""

    text: str
    uncertainty: str = ""
    marks: tuple[int, ...] = ()
    order: float | None = None
    best: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.text, self.uncertainty, self.footnotes)))

    @property
    def footnotes(self) -> str:
        return f"[{','.join(map(str, self.marks))}]" if self.marks else ""


@dataclass
class Footnotes:
    """Numbered remarks; the same text keeps its number."""

    texts: list[str] = field(default_factory=list)

    def marks(self, texts: Sequence[str]) -> tuple[int, ...]:
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
        return tuple(sorted(self.texts.index(text) + 1 for text in texts))


def shown_unit(column: Column) -> str:
    """The unit that a column's numbers are shown in, "" for a pure number."""
    if column.key.partition("@")[0].partition("/")[0] in MILLISECONDS:
        return "ms"
    return UNITS.get(column.unit, column.unit)


def entries(
    cells: Sequence[Cell | None], column: Column, notes: Footnotes, *, brief: bool = False, best: int | None = None
) -> list[Entry]:
    """The cells of one column: value, then ± standard error, (interquartile range) or [interval], then footnotes.

    brief: leave out what is not an interval. best: the place of the cell that is marked.
    """
    factor = 1e3 if shown_unit(column) == "ms" else FACTORS.get(column.unit, 1.0)
    digits = _decimals([cell for cell in cells if cell is not None], column, factor, brief)

    def text(value: float) -> str:
        return f"{value * factor:.{digits}f}"

    ends = [[text(end) for end in (c.low, c.high) if end is not None] for c in cells if c is not None]
    low, high = (max((len(pair[place]) for pair in ends if len(pair) == 2), default=0) for place in (0, 1))

    def uncertainty(cell: Cell) -> str:
        if cell.low is not None and cell.high is not None:
            return f"[{text(cell.low):>{low}}, {text(cell.high):>{high}}]"
        if cell.error is not None and not brief:
            return f"± {text(cell.error)}"
        return f"({text(cell.spread)})" if cell.spread is not None and not brief else ""

    found = []
    for place, cell in enumerate(cells):
        if cell is None:
            found.append(Entry("–"))
        elif cell.value is None:
            found.append(Entry("n/a", marks=notes.marks([cell.missing or "no reason was recorded"])))
        else:
            marks = notes.marks(cell.remarks)
            found.append(Entry(text(cell.value), uncertainty(cell), marks, cell.value, best=place == best))
    return found


def number(value: float, unit: str) -> str:
    """A number alone, in the unit it is shown in and with the digits that unit deserves; without the unit."""
    column = Column(key="", title="", unit=unit, group="quality")
    return entries([Cell(value=value)], column, Footnotes())[0].text


def quantity(value: float, unit: str) -> str:
    """A number with the unit that it is shown in."""
    return f"{number(value, unit)} {UNITS.get(unit, unit)}".rstrip()


def _decimals(cells: Sequence[Cell], column: Column, factor: float, brief: bool) -> int:
    """Decimals that a whole column shares: three digits of its smallest number, or as DECIMALS has it.

    One more where an uncertainty that is shown would read as zero.
    """
    sizes = [abs(cell.value) * factor for cell in cells if cell.value]
    smallest = min(sizes, default=100.0)
    digits = DECIMALS.get(column.unit, max(0, 2 - math.floor(math.log10(smallest))))
    if column.unit in ("bytes", "tok/s", "s") and smallest >= 1:
        digits = min(digits, 1)
    digits = min(digits, 4)
    shown = [] if brief else [abs(e) * factor for c in cells for e in (c.error, c.spread) if e]
    return digits + 1 if shown and min(shown) < 0.5 * 10**-digits else digits


def aligned(column: Sequence[Entry], around: tuple[str, str] = ("", "")) -> list[str]:
    """A column as texts of one width, decimal under decimal. around: what the best number is set between."""
    marked = any(entry.best for entry in column)
    before, after = around if marked else ("", "")
    values = [f"{before}{entry.text}{after}" if entry.best else f"{entry.text}{' ' * len(after)}" for entry in column]
    parts = (values, [entry.uncertainty for entry in column], [entry.footnotes for entry in column])
    widths = [max((len(text) for text in part), default=0) for part in parts]
    lines = []
    for value, uncertainty, footnotes in zip(*parts, strict=True):
        pieces = [value.rjust(widths[0])]
        if widths[1]:
            pieces.append(uncertainty.rjust(widths[1]))
        if widths[2]:
            pieces.append(footnotes.ljust(widths[2]))
        lines.append(" ".join(pieces))
    return lines
