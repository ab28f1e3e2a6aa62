"""Numbers of one column share their decimals and stand under each other."""

from __future__ import annotations

from quantkit.report.entries import Entry, Footnotes, aligned, entries
from quantkit.report.model import Cell, Column


def column(unit: str, key: str = "x") -> Column:
    return Column(key=key, title="x", unit=unit, group="speed")


def texts(unit: str, *cells: Cell, key: str = "x") -> list[str]:
    return [str(entry) for entry in entries(cells, column(unit, key), Footnotes())]


def test_a_column_has_the_decimals_of_its_smallest_number() -> None:
    assert texts("tok/s", Cell(value=28.24), Cell(value=115.66)) == ["28.2", "115.7"]
    assert texts("tok/s", Cell(value=762.4), Cell(value=115.66)) == ["762", "116"]
    assert texts("s", Cell(value=0.0123), Cell(value=3.0)) == ["0.0123", "3.0000"]
    assert texts("bytes", Cell(value=13.9e6), Cell(value=269e6)) == ["13.9", "269.0"]


def test_an_uncertainty_is_not_shown_as_none() -> None:
    assert texts("s", Cell(value=0.168, spread=0.0004), key="first_token") == ["168.0 (0.4)"]
    assert texts("fraction", Cell(value=0.5, error=0.0002)) == ["50.00 ± 0.02"]


def test_decimal_points_stand_under_each_other() -> None:
    cells = [Entry("269.0"), Entry("98.9", "[94.7, 102.5]"), Entry("7.5", "± 0.1", (2, 3), best=True), Entry("–")]
    lines = aligned(cells, ("<", ">"))
    assert lines == [
        "269.0                     ",
        " 98.9  [94.7, 102.5]      ",
        " <7.5>         ± 0.1 [2,3]",
        "    –                     ",
    ]


def test_ends_of_intervals_stand_under_each_other() -> None:
    cells = [Cell(value=0.874, low=0.786, high=0.963), Cell(value=0.989, low=0.947, high=1.025)]
    assert texts("fraction", *cells) == ["87.4 [78.6,  96.3]", "98.9 [94.7, 102.5]"]
