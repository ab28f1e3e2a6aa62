"""Further processes for what the machine decides: how their numbers come together."""

from __future__ import annotations

from typing import Any

from quantkit.bench import rounds
from quantkit.bench.measurement import Measurement
from quantkit.bench.worker import Answer
from quantkit.sections import DivergenceBench, MemoryBench, ThroughputBench


def _measured(metric: str, value: float | None, batch: int | None = None, **more: Any) -> Measurement:
    settings = {} if batch is None else {"batch_size": batch}
    reason = "no engine" if value is None else None
    return Measurement(metric=metric, value=value, unit="tok/s", settings=settings, missing=reason, **more)


def _answer(*measurements: Measurement, **more: Any) -> Answer:
    return Answer(measurements=list(measurements), **more)


def test_a_speed_is_the_median_over_processes_and_keeps_each() -> None:
    first = _answer(_measured("decode", 10.0, 1, samples=3, spread=0.1), _measured("decode", 40.0, 4, samples=2))
    later = [
        _answer(_measured("decode", 16.0, 1, samples=5), _measured("decode", 44.0, 4, samples=2)),
        _answer(_measured("decode", 12.0, 1, samples=3), _measured("decode", 36.0, 4, samples=2)),
    ]
    one, four = rounds.merged(first, later).measurements
    assert (one.value, one.rounds, one.samples) == (12.0, [10.0, 16.0, 12.0], 11)
    assert one.spread == 3.0  # quartiles of 10, 12 and 16 are 11 and 14
    assert (four.value, four.rounds) == (40.0, [40.0, 44.0, 36.0])


def test_what_is_counted_or_was_not_measured_stays() -> None:
    first = _answer(_measured("artifact", 7.0), _measured("peak_vram", None), _measured("perplexity", 9.0))
    again = _answer(_measured("artifact", 7.0), _measured("peak_vram", None))
    assert rounds.merged(first, [again, again]).measurements == first.measurements


def test_a_process_that_fails_leaves_its_reason_and_its_place() -> None:
    first = _answer(_measured("decode", 10.0), notes=["read in parts"], samples={"basics": [1.0]})
    found = rounds.merged(first, ["the process was ended by SIGKILL", _answer(_measured("decode", 12.0))])
    assert found.measurements[0].rounds == [10.0, None, 12.0] and found.measurements[0].value == 11.0
    assert found.notes == ["read in parts", "round 2: the process was ended by SIGKILL"]
    assert found.samples == {"basics": [1.0]}


def test_speed_and_memory_go_round_where_speed_can_be_measured() -> None:
    sections = (DivergenceBench(), ThroughputBench(rounds=4), MemoryBench())
    assert rounds.of_the_machine(sections) == sections[1:]
    assert rounds.wanted(sections) == 4 and rounds.wanted(sections[2:]) == 1
    assert rounds.timed(_answer(_measured("load", 1.0))) and not rounds.timed(_answer(_measured("load", None)))
