"""The best of a column is marked when its interval says so, and only then."""

from __future__ import annotations

import pytest

from quantkit.bench.measurement import Row
from quantkit.report.best import best_line
from quantkit.report.certainty import interval
from quantkit.report.comparison import compare
from quantkit.report.model import Cell
from report.results_samples import measured, missing, results, row


def best(key: str, *rows: Row) -> str | None:
    (comparison,) = compare([results(*rows)])
    column = next(column for column in comparison.columns if column.key == key)
    place = best_line(comparison.lines, column)
    return None if place is None else comparison.lines[place].label


def kl(value: float, error: float | None) -> dict[str, object]:
    return {"replaced": {"kl": measured("kl", value, "nats", error=error)}}


@pytest.mark.parametrize(
    ("other", "error", "expected"),
    [
        (0.05, 0.002, "B"),  # 0.05 + 1.96 * 0.002 lies below 0.08 - 1.96 * 0.002
        (0.075, 0.002, None),  # the two intervals touch
        (0.05, None, None),  # nothing says how sure 0.05 is
        (0.2, 0.002, "A"),
    ],
)
def test_the_intervals_decide(other: float, error: float | None, expected: str | None) -> None:
    assert best("kl", row("A"), row("B", **kl(other, error))) == expected  # type: ignore[arg-type]


def test_more_is_better_for_speeds_and_they_are_as_sure_as_their_spread() -> None:
    fast = {"decode": measured("decode", 36.5, "tok/s", spread=0.3)}
    faster = {"decode": measured("decode", 40.0, "tok/s", spread=0.3)}
    assert best("decode", row("A"), row("B", replaced=fast)) is None
    assert best("decode", row("A"), row("B", replaced=faster)) == "B"


def test_bytes_are_counted_so_any_difference_tells() -> None:
    smaller = {"artifact": measured("artifact", 110e6 - 1, "bytes")}
    assert best("artifact", row("A"), row("B", replaced=smaller)) == "B"
    assert best("artifact", row("A"), row("B")) is None
    assert best("loaded", row("A"), row("B", replaced={"loaded": measured("loaded", 1e6, "bytes")})) is None


def test_the_baseline_and_what_is_missing_do_not_take_part() -> None:
    gone = {"kl": missing("kl", "nats", "no text")}
    assert best("kl", row("A"), row("B", replaced=gone)) is None
    assert best("kl", row("A"), row("B", replaced=gone), row("C", **kl(0.2, 0.001))) == "A"  # type: ignore[arg-type]
    # the baseline's 21.4 is the lowest perplexity
    sure = {"perplexity": measured("perplexity", 22.0, "", error=0.01)}
    poor = {"perplexity": measured("perplexity", 25.0, "", error=0.01)}
    assert best("perplexity", row("A", replaced=sure), row("B", replaced=poor)) == "A"


def test_a_column_without_a_better_side_is_never_marked() -> None:
    unknown = [
        row(name).model_copy(update={"measurements": [*row(name).measurements, measured("odd", v, "", error=0.0)]})
        for name, v in (("A", 1.0), ("B", 2.0))
    ]
    assert best("odd", *unknown) is None


def test_an_interval_is_what_was_recorded_first() -> None:
    assert interval("kl", Cell(value=1.0, low=0.5, high=1.2, error=9.0)) == (0.5, 1.2)
    assert interval("kl", Cell(value=1.0, error=0.5)) == pytest.approx((0.02, 1.98))
    # the mean of 4 values is as sure as Student's t with 3 degrees of freedom
    assert interval("kl", Cell(value=1.0, error=0.1, samples=4)) == pytest.approx((1 - 0.3182, 1 + 0.3182), abs=1e-4)
    assert interval("kl", Cell(value=1.0, spread=0.5)) == (0.5, 1.5)
    assert interval("kl", Cell(value=1.0)) is None
    assert interval("kl", Cell(missing="why")) is None
