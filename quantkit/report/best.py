"""Which artifact is the best of a column: only one whose interval is clear of every other's."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.report.certainty import interval
from quantkit.report.model import Column, Line


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
        ends = interval(column.key, cell)
        if ends is None:
            return None
        # turned around where more is better, so that the least wins
        rivals.append((*((ends[0], ends[1]) if column.better == "lower" else (-ends[1], -ends[0])), place))
    if len(rivals) < 2:
        return None
    _, worst, winner = min(rivals, key=lambda rival: rival[1])
    return winner if all(low > worst for low, _, place in rivals if place != winner) else None
