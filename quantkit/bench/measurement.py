"""What a measurement is, and the file that a bench leaves: the only thing the report reads. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from quantkit.gates.outcome import GateOutcome
from quantkit.schema import Frozen

METRICS_VERSION = 3
"""Raised, with a reason here, whenever a metric's definition changes.

1: the first definitions.
2: kl is over the 4096 likeliest tokens of the baseline and all others as one event, a lower bound that is below by
   what docs/bench.md says; quantiles of kl, total variation and the baseline's own noise are new.
3: speeds, loaded and peak_rss are medians over several fresh processes; a warm-up decodes 8 tokens at most.
"""

RESULTS_SCHEMA_VERSION = 1

SPEED_UNITS = {"prefill": "tok/s", "first_token": "s", "decode": "tok/s", "token_time": "s", "energy": "J/tok"}
"""What is timed, and its units; "prefill/512" is the same of another prompt length."""

KL_QUANTILES = {"kl_p95": 0.95, "kl_p99_9": 0.999}
"""Quantiles of the KL divergence over tokens, by metric."""

DIVERGENCES = {"kl": "nats", **dict.fromkeys(KL_QUANTILES, "nats"), "top1": "fraction", "tv": "fraction"}
"""What an artifact's predictions are measured by beside the baseline's, and the units."""


class Measurement(Frozen):
    """One number, or the reason why there is none.

    value is None exactly when `missing` says why. error is a standard error, spread an interquartile range over
    processes, over repetitions where there was one process, both in `unit`.
    """

    metric: str = Field(description='what was measured, such as "perplexity", "decode", "accuracy/arc_easy"')
    value: float | None
    unit: str = Field(
        description='"bytes", "tok/s", "nats", "fraction", "s", "bits/weight", "x", "J/tok", or "" for a pure number'
    )
    error: float | None = None
    spread: float | None = None
    samples: int | None = None
    rounds: list[float | None] | None = Field(
        None, description="its value in each fresh process, null where that gave none; rows of a file took turns"
    )
    missing: str | None = None
    engine: str | None = Field(None, description="what computed it; 'decoded weights' when the real engine could not")
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics_version: int = METRICS_VERSION


class Layer(Frozen):
    """One linear of an artifact, as its manifest has it."""

    name: str
    applied: str = Field(description='what was done, or "unquantized"')
    bits_per_weight: float
    sqnr_db: float | None = Field(None, description="signal to quantization noise of the weight, in dB")


class Row(Frozen):
    """All that is known of one artifact, or of the baseline."""

    label: str
    artifact: str | None = Field(None, description="name of the artifact's folder or file; None for the baseline")
    method: str | None = Field(None, description="the method's label, such as 'gptq 4-bit g64 act-order'")
    method_name: str | None = Field(None, description="the method's name in the registry, such as 'gptq'")
    format: str | None = None
    quantize_s: float | None = None
    fallbacks: list[str] = Field(default_factory=list, description="layers that did not get what was asked, and why")
    notes: list[str] = Field(default_factory=list)
    recipe: dict[str, Any] | None = Field(None, description="the whole recipe, from the manifest")
    layers: list[Layer] = Field(default_factory=list, description="every linear, from the manifest")
    measurements: list[Measurement] = Field(default_factory=list)
    samples: dict[str, list[float]] = Field(
        default_factory=dict, description="per-question scores by task, for paired comparisons"
    )


class Results(Frozen):
    """The file that `bench` and `run` write and `report` reads."""

    schema_version: int = RESULTS_SCHEMA_VERSION
    name: str
    model: str
    model_notes: list[str] = Field(default_factory=list)
    baseline: Row
    rows: list[Row]
    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    gates: list[GateOutcome] = Field(default_factory=list, description="what the gates of the suite said")
