"""The cells of one line: what was measured of a row, and what follows from it beside its baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from quantkit.bench.measurement import SPEED_UNITS, Measurement, Row
from quantkit.bench.statistics import interquartile_range
from quantkit.report.intervals import another_run, recovered_interval
from quantkit.report.model import Cell

RATES = ("prefill", "decode")
WORKLOAD = ("batch_size", "prompt_tokens", "decode_tokens")
"""The settings that two speeds must share to be compared."""

DECODED = "decoded weights"
"""The engine's name in a measurement when the engine that the artifact is for could not be used."""


def row_cells(row: Row, baseline: Row, *, price_per_hour: float | None = None) -> dict[str, Cell]:
    """Every cell of a row by column key. The baseline itself, passed as both, is compared with nothing.

    price_per_hour: of the machine; every rate then has a cost beside it, such as "decode_cost".
    """
    found = by_key(row)
    cells = {key: _measured(measurement) for key, measurement in found.items()}
    if price_per_hour is not None:
        for key, measurement in found.items():
            if measurement.metric in RATES:
                cells[key.replace(measurement.metric, f"{measurement.metric}_cost", 1)] = _cost(
                    cells[key], price_per_hour
                )
    if row is baseline:
        noise = found.get("kl_noise")
        return {key: cell for key, cell in cells.items() if key != "kl_noise"} | _noise(noise)
    cells["quantize"] = Cell(value=row.quantize_s) if row.quantize_s is not None else Cell(missing="not recorded")
    reference = by_key(baseline)
    cells["memory_saved"] = _saved(found.get("artifact"), reference.get("artifact"))
    for key, measurement in found.items():
        rate = measurement.metric.partition("/")[0]
        if rate in RATES:
            cells[key.replace(rate, f"{rate}_speedup", 1)] = _speedup(measurement, reference.get(key))
    return cells | _accuracy_cells(row, baseline)


def _noise(measurement: Measurement | None) -> dict[str, Cell]:
    """The baseline's own line under KL: how far it is from itself in another dtype."""
    if measurement is None or measurement.value is None:
        return {}
    other, count = measurement.settings.get("against"), measurement.samples
    remark = f"the noise floor: the baseline against itself in {other}, on {count} sequences"
    return {"kl": _measured(measurement).model_copy(update={"remarks": (remark,)})}


def by_key(row: Row) -> dict[str, Measurement]:
    """A row's measurements by column key: the metric, with the batch size where that is not 1."""
    found: dict[str, Measurement] = {}
    for measurement in row.measurements:
        batch = measurement.settings.get("batch_size", 1)
        single = batch == 1 or measurement.metric.partition("/")[0] not in SPEED_UNITS
        key = base = measurement.metric if single else f"{measurement.metric}@{batch}"
        number = 2
        while key in found:
            key = f"{base}#{number}"
            number += 1
        found[key] = measurement
    return found


def task_of(metric: str) -> str | None:
    """The task of an accuracy metric such as "accuracy/piqa", None for every other metric."""
    head, _, task = metric.partition("/")
    return task if head == "accuracy" and task else None


def _measured(measurement: Measurement) -> Cell:
    remarks = []
    if measurement.engine == DECODED and measurement.value is not None:
        text = "computed with the weights decoded from the artifact, not by the engine it is for"
        why = measurement.settings.get("without_engine")
        remarks.append(f"{text}: {why}" if why else text)
    low, high = another_run(_given(measurement.rounds)) or (None, None)
    return Cell(
        value=measurement.value,
        low=low,
        high=high,
        error=measurement.error,
        spread=measurement.spread,
        samples=measurement.samples,
        engine=measurement.engine,
        missing=measurement.missing,
        remarks=tuple(remarks),
    )


def _given(rounds: Sequence[float | None] | None) -> list[float]:
    return [value for value in rounds or () if value is not None]


def _saved(ours: Measurement | None, theirs: Measurement | None) -> Cell:
    if ours is None or ours.value is None:
        return Cell(missing="the artifact's size was not measured")
    if theirs is None or not theirs.value:
        return Cell(missing="the baseline's size was not measured")
    return Cell(value=1 - ours.value / theirs.value)


def _speedup(ours: Measurement, theirs: Measurement | None) -> Cell:
    """Ratio of two rates: the median of each round's own, which met the machine in the same minutes, where there were
    rounds. Without them the spread adds the relative spreads of both in quadrature."""
    if ours.value is None:
        return Cell(missing=ours.missing)
    if theirs is None or not theirs.value:
        reason = theirs.missing if theirs is not None else None
        return Cell(missing=f"the baseline has no such speed: {reason or 'not measured'}")
    apart = [name for name in WORKLOAD if ours.settings.get(name) != theirs.settings.get(name)]
    if apart:
        return Cell(missing=f"the baseline was measured with another {', '.join(apart)}")
    ratio = ours.value / theirs.value
    pairs = zip(ours.rounds or (), theirs.rounds or (), strict=False)
    each = [one / other for one, other in pairs if one is not None and other]
    spread = None
    low, high = another_run(each) or (None, None)
    if low is not None:
        ratio, spread = statistics.median(each), interquartile_range(each)
    elif ours.spread is not None and theirs.spread is not None:
        spread = ratio * math.hypot(ours.spread / ours.value, theirs.spread / theirs.value) if ours.value else 0.0
    remarks: tuple[str, ...] = ()
    if ours.engine and theirs.engine and ours.engine != theirs.engine:
        remarks = (
            f"run by {ours.engine}, the baseline by {theirs.engine}: the ratio holds the engines' difference too",
        )
    return Cell(value=ratio, low=low, high=high, spread=spread, engine=ours.engine, remarks=remarks)


def _cost(rate: Cell, price_per_hour: float) -> Cell:
    """What a million tokens cost at a rate in tokens a second; as sure as the rate is."""
    if not rate.value:
        return Cell(missing=rate.missing or "the rate is 0")
    cost = price_per_hour / 3600 * 1e6 / rate.value
    return Cell(
        value=cost,
        low=rate.high and cost * rate.value / rate.high,
        high=rate.low and cost * rate.value / rate.low,
        spread=None if rate.spread is None else cost * rate.spread / rate.value,
        samples=rate.samples,
        engine=rate.engine,
        remarks=rate.remarks,
    )


def _accuracy_cells(row: Row, baseline: Row) -> dict[str, Cell]:
    """Recovered accuracy and how many answers changed, over the tasks that both have; empty where no task was asked."""
    ours = {task: m for m in row.measurements if (task := task_of(m.metric))}
    theirs = {task: m for m in baseline.measurements if (task := task_of(m.metric))}
    if not ours and not theirs:
        return {}
    tasks = [t for t in theirs if t in ours and theirs[t].value is not None and ours[t].value is not None]
    if not tasks:
        reasons = [m.missing for m in (*ours.values(), *theirs.values()) if m.missing]
        return {"recovered": Cell(missing=reasons[0] if reasons else "no task was measured on both")}
    base = math.fsum(theirs[task].value or 0.0 for task in tasks)
    if base <= 0:
        return {"recovered": Cell(missing="the baseline scores 0")}
    value = math.fsum(ours[task].value or 0.0 for task in tasks) / base
    remarks = []
    if len(tasks) < len(theirs):
        remarks.append(f"over {', '.join(tasks)} alone; the baseline was measured on {len(theirs)} tasks")
    before = [baseline.samples.get(task, []) for task in tasks]
    after = [row.samples.get(task, []) for task in tasks]
    unpaired = [task for task, a, b in zip(tasks, before, after, strict=True) if not a or len(a) != len(b)]
    if unpaired:
        remarks.append(f"no interval: no matching per-question scores for {', '.join(unpaired)}")
        return {"recovered": Cell(value=value, remarks=tuple(remarks))}
    questions = sum(map(len, before))
    changed = sum(x != y for a, b in zip(before, after, strict=True) for x, y in zip(a, b, strict=True))
    if not changed:
        # the rule of three: with none of n seen, the 95% bound on a rate is 3/n
        remarks.append(f"no answer changed; of {questions} questions that excludes only changes in more than 3 of them")
    interval = recovered_interval(before, after)
    if interval is None:
        remarks.append("no interval: the baseline's score may be 0")
    low, high = interval or (None, None)
    return {
        "recovered": Cell(value=value, low=low, high=high, samples=questions, remarks=tuple(remarks)),
        "changed": Cell(value=changed / questions, samples=questions),
    }
