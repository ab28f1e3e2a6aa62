"""Rounds: what the machine decides is measured again in further fresh processes, the models taking turns.

Repetitions in one process share its memory layout and the minute it ran in, so their spread cannot tell how far another
run would be. Processes spread over the whole bench can. Source: Kalibera and Jones, Rigorous Benchmarking in Reasonable
Time, ISMM 2013 (repeat at the highest level that varies).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from quantkit.bench.measurement import Measurement
from quantkit.bench.statistics import interquartile_range
from quantkit.bench.worker import Answer
from quantkit.sections import AnyBench, MemoryBench, ThroughputBench


def of_the_machine(sections: Sequence[AnyBench]) -> tuple[AnyBench, ...]:
    """The sections whose numbers another process would give otherwise; quality comes from seeds and stays as it is."""
    return tuple(section for section in sections if isinstance(section, ThroughputBench | MemoryBench))


def wanted(sections: Sequence[AnyBench]) -> int:
    """How many processes measure the speed of each model; 1 where none is asked for."""
    return max((section.rounds for section in sections if isinstance(section, ThroughputBench)), default=1)


def timed(answer: Answer) -> bool:
    """Whether a process could measure speed: where it could not, another would not either."""
    return any(found.metric == "load" and found.value is not None for found in answer.measurements)


def merged(first: Answer, later: Sequence[Answer | str]) -> Answer:
    """The first process's answer with the medians over all processes.

    later: the answers of further processes in the order of their rounds, or the reason why there is none, which becomes
    a note. A number that every process gave alike was counted, not measured, and stays as it is.
    """
    tables = [_by_workload(answer) if isinstance(answer, Answer) else {} for answer in later]
    found = []
    for key, measurement in _by_workload(first).items():
        alike = [measurement, *(table[key] for table in tables if key in table)]
        values = [measurement.value, *(table[key].value if key in table else None for table in tables)]
        given = [value for value in values if value is not None]
        if measurement.value is None or len(set(given)) < 2:
            found.append(measurement)
            continue
        update: dict[str, Any] = {
            "value": statistics.median(given),
            "spread": interquartile_range(given),
            "rounds": values,
            "samples": sum(one.samples for one in alike if one.samples) or None,
        }
        found.append(measurement.model_copy(update=update))
    reasons = [f"round {number}: {why}" for number, why in enumerate(later, 2) if isinstance(why, str)]
    return first.model_copy(update={"measurements": found, "notes": [*first.notes, *reasons]})


def _by_workload(answer: Answer) -> dict[tuple[str, object, int], Measurement]:
    """Measurements by metric, batch size and how many of these came before."""
    found: dict[tuple[str, object, int], Measurement] = {}
    for one in answer.measurements:
        number = 0
        while (key := (one.metric, one.settings.get("batch_size"), number)) in found:
            number += 1
        found[key] = one
    return found
