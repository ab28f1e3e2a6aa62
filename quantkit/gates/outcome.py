"""What a gate says: part of a results file, so it imports nothing but the schema."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantkit.schema import Frozen

BarName = Literal["min_recovery", "max_kl", "max_bytes", "min_speedup"]
Verdict = Literal["passed", "warned", "failed"]


class GateOutcome(Frozen):
    """One bar and one row. low, high: the 95% interval that was held against the bar, None where there is none."""

    row: str = Field(description="label of the row")
    bar: BarName
    limit: float
    value: float | None
    low: float | None = None
    high: float | None = None
    verdict: Verdict
    reason: str
    sentence: str = Field(description="all of it in a line")
