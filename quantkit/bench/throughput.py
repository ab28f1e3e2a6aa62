"""Throughput: tokens per second of prompt and of decode, and the time to the first token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run
from quantkit.bench.subject import Unavailable
from quantkit.engines import Session
from quantkit.sections import ThroughputBench

UNITS = {"prefill": "tok/s", "decode": "tok/s", "first_token": "s"}


def measure(section: ThroughputBench, run: Run) -> list[Measurement]:
    """prefill, decode and first_token for every batch size: median and interquartile range over the repetitions; and
    load, once.

    A repetition reads a prompt into an empty cache and decodes greedily from there. The first token is there when the
    prompt has been read. The model counts as loaded after a first short pass.
    """
    workload = {"prompt_tokens": section.prompt_tokens, "decode_tokens": section.decode_tokens}
    try:
        session = run.speed()
    except Unavailable as error:
        return [
            Measurement(metric="load", value=None, unit="s", missing=str(error)),
            *(
                Measurement(
                    metric=metric, value=None, unit=unit, missing=str(error), settings={"batch_size": size, **workload}
                )
                for size in section.batch_sizes
                for metric, unit in UNITS.items()
            ),
        ]
    found = [_load(run, session)]
    for size in section.batch_sizes:
        vocabulary = int(run.subject.source.config["vocab_size"])
        prompts = torch.randint(vocabulary, (size, section.prompt_tokens), generator=torch.Generator().manual_seed(0))
        times = section.warmup + section.repetitions
        timings = [_once(session, prompts, section.decode_tokens) for _ in range(times)]
        counted = timings[section.warmup :]
        settings = {
            "batch_size": size,
            **workload,
            "warmup": section.warmup,
            "repetitions": section.repetitions,
            "threads": torch.get_num_threads(),
            "dtype": session.dtype,
            **session.details,
        }
        values = {
            "prefill": [prompts.numel() / first for first, _ in counted],
            "decode": [size * section.decode_tokens / rest for _, rest in counted],
            "first_token": [first for first, _ in counted],
        }
        for metric, unit in UNITS.items():
            found.append(
                Measurement(
                    metric=metric,
                    value=statistics.median(values[metric]),
                    unit=unit,
                    spread=interquartile_range(values[metric]),
                    samples=len(counted),
                    engine=session.engine,
                    settings=settings,
                )
            )
    return found


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


def _once(session: Session, prompts: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds until the first tokens are there, and seconds for `decode_tokens` more of each sequence."""
    started = time.perf_counter()
    tokens = session.prefill(prompts, room=decode_tokens)
    first = time.perf_counter()
    for _ in range(decode_tokens):
        tokens = session.decode(tokens)
    return first - started, time.perf_counter() - first


def interquartile_range(values: Sequence[float]) -> float | None:
    """Third quartile minus first, None for a single value."""
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first
