"""Which artifact is the best of a column: only one whose interval is clear of every other's."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.report.comparison import EXACT
from quantkit.report.model import Cell, Column, Line

NORMAL_95 = 1.96
"""Standard errors on either side that hold 95% of a normal distribution."""


def interval(cell: Cell, column: Column) -> tuple[float, float] | None:
    """What a number may as well have been, None when nothing says.

    A recorded 95% interval, else 1.96 standard errors on either side, else the interquartile range of the repetitions
    on either side; what is counted and not measured, such as bytes, is itself.
    """
    if cell.value is None:
        return None
    if cell.low is not None and cell.high is not None:
        return cell.low, cell.high
    if cell.error is not None:
        return cell.value - NORMAL_95 * cell.error, cell.value + NORMAL_95 * cell.error
    if cell.spread is not None:
        return cell.value - cell.spread, cell.value + cell.spread
    return (cell.value, cell.value) if column.key in EXACT else None


def best_line(lines: Sequence[Line], column: Column) -> int | None:
    """The place of the artifact that is the best of a column, the baseline left aside; None when none is clearly.

    Every artifact with a number has to have an interval, and that of the best one must not touch another.
    """
    if column.better is None:
        return None
    rivals = []
    for place, line in enumerate(lines):
        cell = line.cells.get(column.key)
        if line.baseline or cell is None or cell.value is None:
            continue
        ends = interval(cell, column)
        if ends is None:
            return None
        # turned around where more is better, so that the least wins
        rivals.append((*((ends[0], ends[1]) if column.better == "lower" else (-ends[1], -ends[0])), place))
    if len(rivals) < 2:
        return None
    _, worst, winner = min(rivals, key=lambda rival: rival[1])
    return winner if all(low > worst for low, _, place in rivals if place != winner) else None
