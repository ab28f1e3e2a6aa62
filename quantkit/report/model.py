"""What a comparison is: numbers with their units and reasons, ready to be laid out or written as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from quantkit.bench.measurement import Layer
from quantkit.schema import Frozen

COMPARISON_SCHEMA_VERSION = 1
REPORT_SCHEMA_VERSION = 1

Judgement = Literal["agrees", "parts", "cannot tell", "not measured"]
Quantity = Literal["accuracy kept", "memory saved", "faster"]


class Cell(Frozen):
    """One number of the table with its uncertainty, or the reason why there is none."""

    value: float | None = None
    error: float | None = Field(None, description="standard error")
    spread: float | None = Field(None, description="interquartile range over processes, or over repetitions in one")
    low: float | None = Field(None, description="lower end of the 95% interval")
    high: float | None = None
    samples: int | None = None
    engine: str | None = None
    missing: str | None = None
    remarks: tuple[str, ...] = ()


class Column(Frozen):
    """A quantity that some line has. unit is that of the cells' values."""

    key: str
    title: str
    unit: str
    group: Literal["size", "speed", "quality"]
    better: Literal["lower", "higher"] | None = Field(None, description="None where neither is better as such")


class Line(Frozen):
    """One artifact, or the baseline."""

    label: str
    baseline: bool
    artifact: str | None
    method: str | None
    method_name: str | None
    format: str | None
    runs_on: str | None
    fits_best: str | None
    cells: dict[str, Cell]
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = None
    layers: tuple[Layer, ...] = Field((), description="every linear; empty where no manifest told")


class Verdict(Frozen):
    """One claim of the rule of thumb beside what was measured, all as shares of the baseline."""

    label: str
    quantity: Quantity
    rule_low: float
    rule_high: float
    measured: float | None
    low: float | None = None
    high: float | None = None
    judgement: Judgement
    reason: str


class Comparison(Frozen):
    """One model, one baseline, several artifacts."""

    schema_version: int = COMPARISON_SCHEMA_VERSION
    name: str
    model: str
    model_notes: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...] = Field(description="the baseline first")
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    price_per_hour: float | None = Field(None, description="of the machine, in the currency of the cost columns")
    settings: dict[str, Any]
    environment: dict[str, Any]


class Report(Frozen):
    """The file report.json, and what `report --json` prints."""

    schema_version: int = REPORT_SCHEMA_VERSION
    comparisons: tuple[Comparison, ...] = Field(description="one for each model, machine and baseline")
