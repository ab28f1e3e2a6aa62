"""How sure a cell is: the one place that turns errors, spreads and intervals into what gates, diffs, plots and the mark
of the best reason with."""

from __future__ import annotations

import math

from quantkit.report.intervals import NORMAL_95, student_95
from quantkit.report.model import Cell

EXACT = ("artifact", "memory_saved", "bits_per_weight", "bits_per_weight_all")
"""Counted, not measured: another run gives the same number."""


def interval(key: str, cell: Cell) -> tuple[float, float] | None:
    """The interval of a cell by its column's key, None when nothing says how sure it is.

    Its own 95% interval where it has one; the standard errors on either side of a mean that Student's t has for as many
    values, 1.96 where it does not say how many; the interquartile range on either side of a median over repetitions in
    one process; a count is its own interval.
    """
    if cell.value is None:
        return None
    if cell.low is not None and cell.high is not None:
        return cell.low, cell.high
    if cell.error is not None:
        errors = student_95(cell.samples) if cell.samples and cell.samples > 1 else NORMAL_95
        return cell.value - errors * cell.error, cell.value + errors * cell.error
    if cell.spread is not None:
        return cell.value - cell.spread, cell.value + cell.spread
    return (cell.value, cell.value) if key in EXACT else None


def difference(key: str, before: Cell, after: Cell) -> tuple[float, float] | None:
    """The interval of after - before, None when either has none.

    Both are taken as independent, which is wide for two runs on the same questions. Source: Zou and Donner,
    Construction of confidence limits about effect measures, Statistics in Medicine 27, 2008, equation 4.
    """
    ours, theirs = interval(key, after), interval(key, before)
    if ours is None or theirs is None or after.value is None or before.value is None:
        return None
    apart = after.value - before.value
    below = math.hypot(after.value - ours[0], theirs[1] - before.value)
    above = math.hypot(ours[1] - after.value, before.value - theirs[0])
    return apart - below, apart + above
