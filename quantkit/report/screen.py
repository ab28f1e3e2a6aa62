"""A comparison for the terminal, and for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from quantkit.report.entries import aligned
from quantkit.report.layout import Document, Listing, TextTable, lay_out
from quantkit.report.model import Comparison

PIPED_WIDTH = 100
"""Columns where there is no terminal that would say how many it has."""

BEST = "*"
"""Behind the best number of a column; a pipe has no bold."""

LABEL_WIDTH = 28
"""Longer labels wrap, so that they leave room for numbers."""


def render(comparisons: Sequence[Comparison]) -> RenderableType:
    """The report of one or several comparisons, to be printed by a rich console."""
    return render_documents([lay_out(comparison) for comparison in comparisons])


def render_documents(documents: Sequence[Document]) -> RenderableType:
    """Documents one under the other, to be printed by a rich console."""
    parts: list[RenderableType] = []
    for document in documents:
        parts.append(Text(document.title, style="bold"))
        parts += [Text(line) for line in (*document.lead, *document.best_note(BEST))]
        for part in document.parts:
            if isinstance(part, TextTable):
                parts += [Text(), Text(part.title, style="bold"), _Fitted(part)]
            elif part.title not in ("Settings", "Environment"):
                # these two are for the files; on a screen they would push the table out of sight
                parts += [Text(), Text(part.title, style="bold"), *_listing(part)]
        parts.append(Text())
    return Group(*parts)


def show(comparisons: Sequence[Comparison], stream: TextIO | None = None) -> None:
    """Print the report on `stream` (stdout unless given): as wide as a terminal, 100 columns elsewhere."""
    show_documents([lay_out(comparison) for comparison in comparisons], stream)


def show_documents(documents: Sequence[Document], stream: TextIO | None = None) -> None:
    """Print documents likewise."""
    target = sys.stdout if stream is None else stream
    width = None if target.isatty() else PIPED_WIDTH
    Console(file=target, width=width).print(render_documents(documents))


class _Fitted:
    """A table that is cut into several, labels repeated, where the console is too narrow for all its numbers."""

    def __init__(self, table: TextTable):
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for place, columns in enumerate(_fitting(self._table, options.max_width)):
            if place:
                yield Text()
            yield _table(self._table, columns)


def _texts(table: TextTable, column: int) -> list[str]:
    """The cells of a column, numbers padded to one width."""
    entries = table.column(column)
    return [str(entry) for entry in entries] if column in table.left else aligned(entries, ("", BEST))


def _width(table: TextTable, column: int) -> int:
    """Columns of the screen that a column of numbers needs: its cells unbroken, its header broken between words."""
    return max(len(piece) for piece in (*table.headers[column].split(), *_texts(table, column), ""))


def _fitting(table: TextTable, width: int) -> list[list[int]]:
    """Which columns go into which piece of the table; words wrap, so a table of words is never cut."""
    if len(table.left) == len(table.headers):
        return [list(range(len(table.headers)))]
    label = min(_width(table, 0), LABEL_WIDTH) + 1
    pieces: list[list[int]] = [[0]]
    left = width - label
    for column in range(1, len(table.headers)):
        needed = _width(table, column) + 1
        if needed > left and len(pieces[-1]) > 1:
            pieces.append([0])
            left = width - label
        pieces[-1].append(column)
        left -= needed
    return pieces


def _table(table: TextTable, columns: Sequence[int]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    words = len(table.left) == len(table.headers)
    filled = []
    for column in columns:
        left = column in table.left
        width = None if words else min(_width(table, column), LABEL_WIDTH) if column == 0 else _width(table, column)
        shown.add_column(
            Text(table.headers[column], justify="left" if left else "right"),
            justify="left" if left else "right",
            width=width,
            overflow="fold",
        )
        styles = ["bold" if entry.best else "" for entry in table.column(column)]
        filled.append([Text(text, style) for text, style in zip(_texts(table, column), styles, strict=True)])
    for row in zip(*filled, strict=True):
        shown.add_row(*row)
    return shown


def _listing(listing: Listing) -> list[RenderableType]:
    return [Padding(Text(f"- {item}"), (0, 0, 0, 2)) for item in listing.items]
