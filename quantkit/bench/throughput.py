"""Throughput: tokens per second of prompt and of decode, the time to the first token and for each one after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.bench.energy import EnergyCounter
from quantkit.bench.measurement import SPEED_UNITS, Measurement
from quantkit.bench.run import Run
from quantkit.bench.statistics import interquartile_range
from quantkit.bench.subject import Unavailable
from quantkit.bench.unmeasured import missing_speeds, workload
from quantkit.engines import Session
from quantkit.sections import ThroughputBench

WARMUP_STEPS = 8
"""Tokens that a warm-up decodes at most: enough for every buffer and thread to be there."""

LEAST_S = 1.0
"""Seconds that the repetitions of a workload take together at least."""


@dataclass(frozen=True)
class Timing:
    """One repetition. first: seconds until the first tokens were there. rest: seconds for all that followed. joules:
    what the following took, None where the machine has no counter."""

    first: float
    rest: float
    joules: float | None


def measure(section: ThroughputBench, run: Run) -> list[Measurement]:
    """prefill, first_token, decode and token_time for every batch size, prefill/N and first_token/N for further prompt
    lengths at the first batch size: median and interquartile range over the repetitions; load once; energy where there
    is a counter.

    A repetition reads a prompt into an empty cache and decodes greedily from there, behind the first prompt length
    alone. There are as many as asked for and as fill a second. The first token is there when the prompt has been read.
    The model counts as loaded after a first short pass.
    """
    try:
        session = run.speed()
    except Unavailable as error:
        return missing_speeds(section, str(error))
    found = [_load(run, session)]
    counter = EnergyCounter(run.device.type)
    vocabulary = int(run.subject.source.config["vocab_size"])
    for size in section.batch_sizes:
        for position, length in enumerate(section.prompt_lengths(size)):
            prompts = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(0))
            steps = 0 if position else section.decode_tokens
            for _ in range(section.warmup):
                _once(session, prompts, min(steps, WARMUP_STEPS), counter)
            timings = _repeated(section.repetitions, session, prompts, steps, counter)
            settings = {
                **workload(section, size, length),
                "warmup": section.warmup,
                "repetitions": section.repetitions,
                "least_seconds": LEAST_S,
                "threads": torch.get_num_threads(),
                "dtype": session.dtype,
                **session.details,
            }
            suffix = f"/{length}" if position else ""
            for metric, values in _values(timings, prompts, steps).items():
                found.append(_median(metric + suffix, SPEED_UNITS[metric], values, session.engine, settings))
    return found


def _values(timings: Sequence[Timing], prompts: Tensor, steps: int) -> dict[str, list[float]]:
    """{metric: its value in each repetition}."""
    values = {
        "prefill": [prompts.numel() / one.first for one in timings],
        "first_token": [one.first for one in timings],
    }
    if steps:
        values["decode"] = [len(prompts) * steps / one.rest for one in timings]
        values["token_time"] = [one.rest / steps for one in timings]
        joules = [one.joules for one in timings if one.joules is not None]
        if joules:
            values["energy"] = [taken / (len(prompts) * steps) for taken in joules]
    return values


def _median(metric: str, unit: str, values: Sequence[float], engine: str, settings: dict[str, Any]) -> Measurement:
    return Measurement(
        metric=metric,
        value=statistics.median(values),
        unit=unit,
        spread=interquartile_range(values),
        samples=len(values),
        engine=engine,
        settings=settings,
    )


def _load(run: Run, session: Session) -> Measurement:
    settings = {"file": "read once before", "threads": torch.get_num_threads(), "dtype": session.dtype}
    return Measurement(
        metric="load",
        value=run.load_s,
        unit="s",
        samples=1,
        engine=session.engine,
        settings={**settings, **session.details},
    )


def _repeated(least: int, session: Session, prompts: Tensor, steps: int, counter: EnergyCounter) -> list[Timing]:
    """As many repetitions as asked for, and more until they took a second: a pause of the machine is a small part of
    that, and may be all of a pass that takes milliseconds."""
    found: list[Timing] = []
    while len(found) < least or sum(one.first + one.rest for one in found) < LEAST_S:
        found.append(_once(session, prompts, steps, counter))
    return found


def _once(session: Session, prompts: Tensor, steps: int, counter: EnergyCounter) -> Timing:
    started = time.perf_counter()
    tokens = session.prefill(prompts, room=steps)
    first = time.perf_counter()
    counter.restart()
    for _ in range(steps):
        tokens = session.decode(tokens)
    rest = time.perf_counter() - first
    return Timing(first - started, rest, counter.joules() if counter.available and steps else None)
