"""What became of the layers: noise and bits of each line at a glance, and one by one."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence

from quantkit.bench.measurement import Layer
from quantkit.report.entries import Entry
from quantkit.report.model import Line

UNQUANTIZED = "unquantized"
BLOCK = re.compile(r"\.(\d+)\.")


def layer_table(lines: Sequence[Line]) -> tuple[list[str], list[list[str | Entry]], list[str]] | None:
    """Headers, rows and units of the table of layers: one row a line that has them; None where no line has."""
    titles = ("", "linears", "left as they are", "median SQNR", "lowest SQNR", "fewest bits", "most bits", "noisiest")
    units = ["", "", "", "dB", "dB", "bits/weight", "bits/weight", ""]
    rows: list[list[str | Entry]] = []
    for line in lines:
        done = [layer for layer in line.layers if layer.applied != UNQUANTIZED]
        if not done:
            continue
        noise = [layer.sqnr_db for layer in done if layer.sqnr_db is not None]
        bits = [layer.bits_per_weight for layer in done]
        counts = [len(done), len(line.layers) - len(done)]
        middle = _number(statistics.median(noise) if noise else None, 1)
        measured = [middle, _number(min(noise, default=None), 1), _number(min(bits), 2), _number(max(bits), 2)]
        worst = min((layer for layer in done if layer.sqnr_db is not None), key=_noise, default=None)
        rows.append([line.label, *(Entry(str(n), order=n) for n in counts), *measured, worst.name if worst else "–"])
    headers = [" ".join(filter(None, pair)) for pair in zip(titles, units, strict=True)]
    return (headers, rows, units) if rows else None


def _noise(layer: Layer) -> float:
    return math.inf if layer.sqnr_db is None else layer.sqnr_db


def _number(value: float | None, digits: int) -> Entry:
    return Entry("–") if value is None else Entry(f"{value:.{digits}f}", order=value)


def place_of(layer: Layer) -> tuple[int, str] | None:
    """The block that a linear stands in and its role there, None for a linear outside the blocks."""
    found = BLOCK.search(layer.name)
    return None if found is None else (int(found[1]), layer.name[found.end() :].rsplit(".", 1)[-1])
