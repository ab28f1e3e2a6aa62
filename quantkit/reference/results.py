"""The file that a comparison leaves: what each engine took, what it wrote and what that lost. Imports no torch."""

from __future__ import annotations

import statistics
from typing import Any

from pydantic import Field

from quantkit.schema import Frozen

COMPARISON_SCHEMA_VERSION = 1
"""Raised, with a reason here, whenever the meaning of a field changes.

1: the first.
"""


class Cost(Frozen):
    """What one run took: a whole process, from its start to its end, with every process it started.

    quantize_s is the engine's own quantize call, load_s and save_s what stands around it; None where the engine does
    all in one.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    peak_vram_bytes: int | None = None
    load_s: float | None = None
    quantize_s: float | None = None
    save_s: float | None = None

    @property
    def folder_s(self) -> float | None:
        """From the model's folder to the artifact's, without imports: what all engines do alike."""
        parts = [self.load_s, self.quantize_s, self.save_s]
        return None if self.quantize_s is None else sum(part for part in parts if part is not None)


class Figure(Frozen):
    """A mean over sequences and its standard error, None for a single sequence."""

    value: float
    error: float | None = None


class EngineRow(Frozen):
    """One engine on the job; `reason` says why there are no figures, or why some are missing."""

    engine: str
    label: str = Field(description="engine, version and the settings it ran with")
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    reason: str | None = None
    runs: list[Cost] = Field(default_factory=list)
    format: str | None = None
    bytes: int | None = Field(None, description="of the weight files")
    bits_per_weight: float | None = Field(None, description="of the quantized linears, scales and zeros included")
    perplexity: Figure | None = None
    kl: Figure | None = Field(None, description="from the unquantized model, nats")
    top1: Figure | None = Field(None, description="share of positions whose likeliest token is the same")

    def spread(self, name: str) -> tuple[float, float, float] | None:
        """Median, lowest and highest of a field of `runs`, None when no run has it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return (statistics.median(values), min(values), max(values)) if values else None


class Floor(Frozen):
    """The least time that the job can take at the machine's rate of multiplying matrices; see reference/floor.py."""

    gemm_flop_per_s: float
    one_pass_flop: int
    two_pass_flop: int

    @property
    def one_pass_s(self) -> float:
        return self.one_pass_flop / self.gemm_flop_per_s

    @property
    def two_pass_s(self) -> float:
        return self.two_pass_flop / self.gemm_flop_per_s


class ComparisonResults(Frozen):
    """One job, one machine, one run."""

    schema_version: int = COMPARISON_SCHEMA_VERSION
    name: str
    created: str
    model: str
    model_notes: list[str] = Field(default_factory=list)
    job: str = Field(description="what every engine was asked for")
    rows: list[EngineRow]
    baseline_perplexity: Figure | None = None
    floor: Floor | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
