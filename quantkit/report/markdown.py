"""A comparison as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantkit.report.entries import aligned
from quantkit.report.layout import Document, Listing, TextTable, lay_out
from quantkit.report.model import Comparison

MARKUP = re.compile(r"[\\`*<>]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown would read as markup; an underscore inside a word is none."""


BOLD = "\0\0"
"""Stands for the two stars of a bold number while the rest is escaped."""


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The report of one or several comparisons, one section each."""
    return "\n".join(document_markdown(lay_out(comparison)) for comparison in comparisons)


def document_markdown(document: Document) -> str:
    """One document, its title as the first heading."""
    lines = [f"# {document.title}", "", *(f"{escaped(line)}  " for line in document.lead)]
    lines += [*document.best_note("**Bold**"), ""]
    for part in document.parts:
        lines += [f"## {part.title}", "", *(_table(part) if isinstance(part, TextTable) else _listing(part)), ""]
    return "\n".join(lines)


def _table(table: TextTable) -> list[str]:
    """Columns padded to one width, so that the file reads as a table without a viewer too."""
    columns = [
        [_cell(str(entry)) for entry in table.column(place)]
        if place in table.left
        else [_bold(text) for text in aligned(table.column(place), (BOLD, BOLD))]
        for place in range(len(table.headers))
    ]
    cells = [[_cell(text) for text in table.headers], *map(list, zip(*columns, strict=True))]
    widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(table.headers))]

    def line(row: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if place in table.left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ("-" * width if place in table.left else "-" * (width - 1) + ":" for place, width in enumerate(widths))
    return [line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])]


def _bold(text: str) -> str:
    return _cell(text).replace(BOLD, "**")


def _listing(listing: Listing) -> list[str]:
    return [f"- {escaped(item)}" for item in listing.items]


def escaped(text: str) -> str:
    """Characters that Markdown would take for markup, kept as they are."""
    return MARKUP.sub(r"\\\g<0>", text).replace("\n", " ")


def _cell(text: str) -> str:
    return escaped(text).replace("|", "\\|")
