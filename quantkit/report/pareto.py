"""What each plot shows: quality against bytes and against decode speed, and which artifacts no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.report.certainty import interval
from quantkit.report.entries import FACTORS, shown_unit
from quantkit.report.model import Cell, Column, Comparison, Line

QUALITIES = ("kl", "perplexity", "recovered")
COSTS = ("artifact", "decode")
TITLES = {"kl": "KL to baseline", "recovered": "accuracy recovered", "artifact": "artifact", "decode": "decode"}

BY_DEFINITION = {"kl": 0.0, "recovered": 1.0}
"""What the baseline has where it is compared with itself."""


@dataclass(frozen=True)
class Axis:
    """What one side of a plot measures, its unit, and which way is better."""

    title: str
    unit: str
    better: str

    def __str__(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Point:
    """One line of the table. Ends are those of intervals, equal to the value where nothing was measured of them."""

    label: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    baseline: bool = False
    front: bool = False


@dataclass(frozen=True)
class Plot:
    """x and y of each point are (low, value, high) in the units of the axes. absent: lines without one, and why."""

    key: str
    x: Axis
    y: Axis
    points: tuple[Point, ...]
    absent: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.y.title} against {self.x.title} {'speed' if self.x.unit == 'tok/s' else 'size'}"


def plots(comparison: Comparison) -> list[Plot]:
    """Quality against bytes, then against decode speed; a plot with fewer than two artifacts is left out."""
    columns = {column.key: column for column in comparison.columns}
    made = [
        _plot(comparison.lines, columns[cost], columns[quality])
        for cost in COSTS
        for quality in QUALITIES
        if cost in columns and quality in columns
    ]
    return [plot for plot in made if sum(not point.baseline for point in plot.points) >= 2]


def _plot(lines: Sequence[Line], x: Column, y: Column) -> Plot:
    points: list[Point] = []
    absent = []
    for line in lines:
        across, up = _ends(line, x), _ends(line, y)
        if across is not None and up is not None:
            points.append(Point(line.label, across, up, baseline=line.baseline))
        elif not line.baseline:
            column = x if across is None else y
            cell = line.cells.get(column.key)
            reason = cell.missing if cell is not None and cell.missing else "not measured"
            absent.append(f"{line.label}: {column.title}: {reason}")
    front = _front(points, x.better == "higher", y.better == "higher")
    return Plot(
        key=f"{y.key}-{x.key}",
        x=_axis(x),
        y=_axis(y),
        points=tuple(Point(p.label, p.x, p.y, p.baseline, p.label in front) for p in points),
        absent=tuple(absent),
    )


def _axis(column: Column) -> Axis:
    return Axis(TITLES.get(column.key, column.title), shown_unit(column), column.better or "")


def _ends(line: Line, column: Column) -> tuple[float, float, float] | None:
    """(low, value, high) in the unit that is shown."""
    cell = line.cells.get(column.key)
    if cell is None and line.baseline and column.key in BY_DEFINITION:
        cell = Cell(value=BY_DEFINITION[column.key])
    if cell is None or cell.value is None:
        return None
    low, high = interval(column.key, cell) or (cell.value, cell.value)
    factor = FACTORS.get(column.unit, 1.0)
    return low * factor, cell.value * factor, high * factor


def _front(points: Sequence[Point], more_x: bool, more_y: bool) -> set[str]:
    """Labels of the artifacts that no other artifact beats in one quantity without losing in the other."""
    turned = [
        (point.x[1] * (-1 if more_x else 1), point.y[1] * (-1 if more_y else 1), point.label)
        for point in points
        if not point.baseline
    ]
    return {
        label for x, y, label in turned if not any(ox <= x and oy <= y and (ox < x or oy < y) for ox, oy, _ in turned)
    }
