"""What a bench would have measured: every measurement of its sections, with the reason why it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.bench.measurement import DIVERGENCES, SPEED_UNITS, Measurement
from quantkit.sections import (
    AccuracyBench,
    AnyBench,
    DivergenceBench,
    MemoryBench,
    SpeculativeBench,
    ThroughputBench,
)


def missing(sections: Sequence[AnyBench], reason: str) -> list[Measurement]:
    """Every measurement that the sections would have given, with the reason why it is not there."""
    found = []
    for section in sections:
        if isinstance(section, ThroughputBench):
            found += missing_speeds(section, reason)
        else:
            found += [_missing(metric, unit, reason) for metric, unit in _wanted(section)]
    return found


def _wanted(section: AnyBench) -> list[tuple[str, str]]:
    """Metrics and units of a section."""
    if isinstance(section, MemoryBench):
        sizes = [(metric, "bytes") for metric in ("artifact", "loaded", "peak_rss", "peak_vram")]
        return sizes + [(metric, "bits/weight") for metric in ("bits_per_weight", "bits_per_weight_all")]
    if isinstance(section, DivergenceBench):
        return [("perplexity", ""), *DIVERGENCES.items()]
    if isinstance(section, AccuracyBench):
        return [(f"accuracy/{task}", "fraction") for task in section.tasks]
    if isinstance(section, SpeculativeBench):
        return [("acceptance", "fraction"), ("draft_speedup", "x")]
    return []


def missing_speeds(section: ThroughputBench, reason: str) -> list[Measurement]:
    """Every measurement of a throughput section but the energy, which few machines count."""
    found = [_missing("load", "s", reason)]
    for size in section.batch_sizes:
        for position, length in enumerate(section.prompt_lengths(size)):
            for metric in (
                ("prefill", "first_token") if position else ("prefill", "first_token", "decode", "token_time")
            ):
                name = f"{metric}/{length}" if position else metric
                found.append(_missing(name, SPEED_UNITS[metric], reason, workload(section, size, length)))
    return found


def workload(section: ThroughputBench, size: int, length: int) -> dict[str, Any]:
    """The settings that two speeds must share to be compared."""
    return {"batch_size": size, "prompt_tokens": length, "decode_tokens": section.decode_tokens}


def _missing(metric: str, unit: str, reason: str, settings: dict[str, Any] | None = None) -> Measurement:
    return Measurement(metric=metric, value=None, unit=unit, missing=reason, settings=settings or {})
