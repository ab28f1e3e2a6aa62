"""A comparison as one HTML page that needs nothing else: no network, no fonts, no files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

import yaml

from quantkit.report.entries import Entry
from quantkit.report.heat import HEAT_STYLE, bits_map, noise_map
from quantkit.report.layers import UNQUANTIZED
from quantkit.report.layout import GROUPS, INTERVAL, Document, Listing, TextTable, lay_out
from quantkit.report.model import Comparison, Line
from quantkit.report.pareto import plots
from quantkit.report.svg import SHAPES_STYLE, scatter

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The browser itself then refuses whatever would leave the page."""

FOLDED = ("Settings", "Environment")
ERRORS = "± one standard error · (interquartile range of repetitions in one process) · "
READING = f"{INTERVAL} · n/a: not measured, and why"


def page(comparisons: Sequence[Comparison]) -> str:
    """The report of one or several comparisons, one under the other."""
    names = ", ".join(dict.fromkeys(comparison.name for comparison in comparisons))
    body = "\n".join(_article(comparison, place) for place, comparison in enumerate(comparisons, 1))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(names)} · quantkit report</title>\n"
        f"<style>\n{_asset('page.css')}{SHAPES_STYLE}{HEAT_STYLE}\n</style>\n</head>\n<body>\n{body}\n"
        f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _article(comparison: Comparison, place: int) -> str:
    document = lay_out(comparison)
    sections = [_header(comparison, document)]
    parts = {part.title: part for part in document.parts}
    for title, part in parts.items():
        if isinstance(part, TextTable):
            more = _layers(comparison.lines, place) if title == "Layers" else _below(title, document)
            sections.append(_section(title, _table(part, place) + more))
        elif title in FOLDED:
            sections.append(_folded(title, _listing(part, place)))
        else:
            sections.append(_section(title, _listing(part, place)))
        if title == "Summary":
            sections.append(_plots(comparison))
    sections += _recipes(comparison.lines)
    return f'<article id="r{place}">\n' + "\n".join(filter(None, sections)) + "\n</article>"


def _header(comparison: Comparison, document: Document) -> str:
    facts = [comparison.name, f"baseline {comparison.lines[0].label}", *comparison.model_notes]
    environment = comparison.environment
    machine = [str(environment[key]) for key in ("gpu", "cpu") if environment.get(key)]
    if environment.get("threads"):
        machine.append(f"{environment['threads']} threads")
    facts += [", ".join(machine)] if machine else []
    said = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<header>\n<h1>{escape(comparison.model)}</h1>\n<ul class="facts">{said}</ul>\n</header>'


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary><h2>{escape(title)}</h2></summary>\n{content}\n</details>"


def _below(title: str, document: Document) -> str:
    """How the numbers of a table are read."""
    if title == "Summary":
        mark = "".join(document.best_note("Marked")).removesuffix(".")
        return f'\n<p class="reading">{escape(" · ".join(filter(None, [mark, READING, "MB are 10⁶ bytes"])))}</p>'
    return f'\n<p class="reading">{escape(ERRORS + READING)}</p>' if title in GROUPS.values() else ""


def _table(table: TextTable, place: int) -> str:
    """A table that scrolls in its own frame where it is too wide, and is sorted by the buttons in its head."""
    widths = [
        max((len(entry.uncertainty) for entry in table.column(at)), default=0) for at in range(len(table.headers))
    ]
    notes = [max((len(entry.footnotes) for entry in table.column(at)), default=0) for at in range(len(table.headers))]
    units = table.units or [""] * len(table.headers)
    head = "".join(
        _heading(header, unit, at in table.left)
        for at, (header, unit) in enumerate(zip(table.headers, units, strict=True))
    )
    body = []
    for row in table.rows:
        cells = [Entry(cell) if isinstance(cell, str) else cell for cell in row]
        first = f'<th scope="row">{escape(cells[0].text)}{_marks(cells[0], place)}</th>'
        rest = "".join(
            _cell(entry, at in table.left, widths[at], notes[at], place) for at, entry in enumerate(cells) if at
        )
        body.append(f"<tr>{first}{rest}</tr>")
    name = escape(table.title, quote=True)
    return (
        f'<div class="frame" role="region" tabindex="0" aria-label="{name}, table">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>\n</div>"
    )


def _heading(header: str, unit: str, left: bool) -> str:
    title = escape(header.removesuffix(unit).rstrip() or "row")
    hidden = "" if header else ' class="unseen"'
    shown = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    kind = ' class="words"' if left else ""
    button = f'<button type="button"><span{hidden}>{title}</span>{shown}</button>'
    return f'<th scope="col" aria-sort="none"{kind}>{button}</th>'


def _width(text: str) -> float:
    """About how wide a text is, in widths of a digit."""
    return sum(1.0 if letter.isdigit() or letter in "±+" else 0.5 for letter in text)


def _cell(entry: Entry, left: bool, width: float, notes: float, place: int) -> str:
    if left:
        return f'<td class="words">{escape(entry.text)}</td>'
    order = "" if entry.order is None else f' data-order="{entry.order!r}"'
    value = escape(entry.text)
    value = f'<strong title="the best, clear of every other">{value}</strong>' if entry.best else value
    if entry.text in ("–", "n/a"):
        value = f'<span class="gone">{value}</span>'
    marks = _marks(entry, place)
    if width and marks and not entry.uncertainty:
        # a footnote stands at its number, not behind the empty place of an uncertainty
        return f'<td{order}>{value}<span class="marks" style="min-width:{width + notes:g}ch">{marks}</span></td>'
    more = f'<span class="more" style="min-width:{width:g}ch">{escape(entry.uncertainty)}</span>' if width else ""
    kept = f'<span class="marks" style="min-width:{notes:g}ch">{marks}</span>' if notes else ""
    return f"<td{order}>{value}{more}{kept}</td>"


def _marks(entry: Entry, place: int) -> str:
    links = ",".join(f'<a href="#r{place}n{mark}">{mark}</a>' for mark in entry.marks)
    return f"<sup>{links}</sup>" if links else ""


def _listing(listing: Listing, place: int) -> str:
    if listing.title in FOLDED:
        rows = [item.partition(": ") for item in listing.items]
        said = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, _, value in rows)
        return f"<dl>{said}</dl>"
    items = []
    for item in listing.items:
        numbered = re.match(r"\[(\d+)\] (.*)", item, flags=re.DOTALL) if listing.title == "Notes" else None
        if numbered:
            items.append(f'<li id="r{place}n{numbered[1]}" value="{numbered[1]}">{escape(numbered[2])}</li>')
        else:
            items.append(f"<li>{escape(item)}</li>")
    tag = "ol" if listing.title == "Notes" else "ul"
    return f"<{tag}>{''.join(items)}</{tag}>"


def _plots(comparison: Comparison) -> str:
    drawn = plots(comparison)
    if not drawn:
        return ""
    figures = "".join(f"<figure>{scatter(plot)}</figure>" for plot in drawn)
    absent = dict.fromkeys(text for plot in drawn for text in plot.absent)
    missing = f" Not drawn: {'; '.join(absent)}." if absent else ""
    reading = (
        "Dashed: the artifacts that no other one beats in both. Bars: 95% intervals, of speeds measured in one process "
        f"the interquartile range of the repetitions. Hollow, and the dotted line: the baseline.{missing}"
    )
    return _section(
        "Quality against size and speed",
        f'<div class="plots">{figures}</div>\n<p class="reading">{escape(reading)}</p>',
    )


def _layers(lines: Sequence[Line], place: int) -> str:
    maps = [drawn for line in lines for drawn in (noise_map(line), bits_map(line)) if drawn]
    figures = f'\n<div class="plots">{"".join(f"<figure>{drawn}</figure>" for drawn in maps)}</div>' if maps else ""
    reading = (
        '<p class="reading">The stronger the colour, the lower the number; every map has its own scale.</p>'
        if maps
        else ""
    )
    return figures + reading + _folded("Every layer", _table(_layer_by_layer(lines), place))


def _layer_by_layer(lines: Sequence[Line]) -> TextTable:
    """A row for every linear, SQNR and bits of each artifact side by side."""
    shown = [line for line in lines if line.layers]
    names = dict.fromkeys(layer.name for line in shown for layer in line.layers)
    found = [{layer.name: layer for layer in line.layers} for line in shown]
    units = ["", *(unit for _ in shown for unit in ("dB", "bits"))]
    headers = ["linear", *(f"{line.label} {unit}" for line in shown for unit in ("dB", "bits"))]
    rows: list[list[str | Entry]] = []
    for name in names:
        row: list[str | Entry] = [name]
        for layers in found:
            layer = layers.get(name)
            if layer is None or layer.sqnr_db is None or layer.applied == UNQUANTIZED:
                row.append(Entry("–"))
            else:
                row.append(Entry(f"{layer.sqnr_db:.1f}", order=layer.sqnr_db))
            bits = None if layer is None else layer.bits_per_weight
            row.append(Entry("–") if bits is None else Entry(f"{bits:.2f}", order=bits))
        rows.append(row)
    return TextTable("Every layer", headers, rows, units=units)


def _recipes(lines: Sequence[Line]) -> list[str]:
    texts = [
        f"<h3>{escape(line.label)}</h3>\n<pre>{escape(yaml.safe_dump(line.recipe, sort_keys=False, width=100))}</pre>"
        for line in lines
        if line.recipe is not None
    ]
    return [_folded("Recipes", "\n".join(texts))] if texts else []
