"""Results written by hand, small enough to check in the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.bench.measurement import Measurement, Results, Row

WORK: dict[str, Any] = {"batch_size": 1, "prompt_tokens": 128, "decode_tokens": 32}
BASELINE_SAMPLES = [1.0] * 60 + [0.0] * 40
CHANGED_SAMPLES = [0.0] * 5 + [1.0] * 55 + [0.0] * 40


def measured(metric: str, value: float, unit: str, **more: Any) -> Measurement:
    if unit == "tok/s":
        more = {"settings": WORK, "engine": "transformers"} | more
    return Measurement(metric=metric, value=value, unit=unit, **more)


def missing(metric: str, unit: str, reason: str) -> Measurement:
    return Measurement(metric=metric, value=None, unit=unit, missing=reason, settings=WORK if unit == "tok/s" else {})


def _with(
    usual: list[Measurement], replaced: Mapping[str, Measurement] | None, without: Mapping[str, str] | None
) -> list[Measurement]:
    changes = dict(replaced or {})
    for m in usual:
        if without and m.metric in without:
            changes[m.metric] = missing(m.metric, m.unit, without[m.metric])
    return [*(changes.pop(m.metric, m) for m in usual), *changes.values()]


def baseline_row(replaced: Mapping[str, Measurement] | None = None) -> Row:
    usual = [
        measured("artifact", 270e6, "bytes"),
        measured("bits_per_weight", 16.0, "bits/weight"),
        measured("bits_per_weight_all", 16.0, "bits/weight"),
        measured("loaded", 284e6, "bytes"),
        missing("peak_vram", "bytes", "no GPU"),
        measured("prefill", 240.0, "tok/s", spread=2.4),
        measured("decode", 24.0, "tok/s", spread=0.48),
        measured("first_token", 0.25, "s", spread=0.01),
        measured("perplexity", 21.4, "", error=0.8, engine="transformers"),
        measured("accuracy/piqa", 0.6, "fraction", error=0.05, samples=100),
    ]
    return Row(label="FP16", measurements=_with(usual, replaced, None), samples={"piqa": BASELINE_SAMPLES})


def row(
    label: str,
    *,
    name: str = "nf4",
    replaced: Mapping[str, Measurement] | None = None,
    without: Mapping[str, str] | None = None,
    samples: list[float] | None = None,
) -> Row:
    """An artifact of 110 MB with half the baseline's time a token; replaced, without: other measurements by metric."""
    scores = CHANGED_SAMPLES if samples is None else samples
    usual = [
        measured("artifact", 110e6, "bytes"),
        measured("bits_per_weight", 4.13, "bits/weight"),
        measured("bits_per_weight_all", 6.5, "bits/weight"),
        measured("loaded", 115e6, "bytes"),
        missing("peak_vram", "bytes", "no GPU"),
        measured("prefill", 300.0, "tok/s", spread=3.0),
        measured("decode", 36.0, "tok/s", spread=0.36),
        measured("first_token", 0.2, "s", spread=0.01),
        measured("perplexity", 22.9, "", error=0.9, engine="transformers"),
        measured("kl", 0.08, "nats", error=0.002),
        measured("top1", 0.91, "fraction", error=0.003),
        measured("accuracy/piqa", sum(scores) / len(scores), "fraction", error=0.05, samples=len(scores)),
    ]
    return Row(
        label=label,
        artifact=label.lower(),
        method=f"{name} 4-bit",
        method_name=name,
        format="bitsandbytes",
        quantize_s=3.0,
        measurements=_with(usual, replaced, without),
        samples={"piqa": scores},
    )


def results(*rows: Row, name: str = "demo", baseline: Row | None = None) -> Results:
    return Results(
        name=name,
        model="SmolLM2-135M-Instruct",
        model_notes=["dequantized Q4_1 baseline"],
        baseline=baseline or baseline_row(),
        rows=list(rows),
        settings={"throughput": {"repetitions": 5}},
        environment={"device": "cpu", "packages": {"torch": "2.13.0", "gptqmodel": None}},
    )
