"""Two runs side by side: what the intervals tell, what they do not, and what must not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit import cli
from quantkit.bench.measurement import METRICS_VERSION, Results
from quantkit.errors import DataError
from quantkit.report.certainty import difference, interval
from quantkit.report.difference import Change, compare_runs, worse
from quantkit.report.model import Cell
from report.results_samples import WORK, baseline_row, measured, results, row


def change(before: Results, after: Results, metric: str, label: str = "GPTQ") -> Change:
    (found,) = [it for it in compare_runs(before, after).changes if (it.row, it.metric) == (label, metric)]
    return found


def with_kl(value: float, error: float | None = 0.002, **more: Any) -> Results:
    return results(row("GPTQ", replaced={"kl": measured("kl", value, "nats", error=error, **more)}))


def test_the_interval_of_a_difference() -> None:
    before, after = Cell(value=2.0, error=0.3), Cell(value=5.0, error=0.4)
    low, high = difference("kl", before, after) or (0, 0)
    # normal errors add in quadrature: 0.5
    assert (low, high) == pytest.approx((3 - 1.96 * 0.5, 3 + 1.96 * 0.5))
    skewed = Cell(value=5.0, low=4.0, high=9.0)
    low, high = difference("recovered", Cell(value=2.0, low=1.0, high=2.5), skewed) or (0, 0)
    assert (low, high) == pytest.approx((3 - (1 + 0.25) ** 0.5, 3 + (16 + 1) ** 0.5))
    assert difference("kl", before, Cell(value=1.0)) is None
    assert interval("artifact", Cell(value=7.0)) == (7.0, 7.0)
    assert interval("decode", Cell(value=7.0, spread=0.5)) == (6.5, 7.5)
    assert interval("kl", Cell(missing="no text")) is None


@pytest.mark.parametrize(
    ("value", "judgement"), [(0.09, "worse"), (0.07, "better"), (0.082, "cannot tell"), (0.08, "same")]
)
def test_less_divergence_is_better(value: float, judgement: str) -> None:
    assert change(with_kl(0.08), with_kl(value), "kl").judgement == judgement


def test_more_speed_is_better_and_ratios_follow() -> None:
    faster = results(row("GPTQ", replaced={"decode": measured("decode", 40.0, "tok/s", spread=0.4)}))
    assert change(results(row("GPTQ")), faster, "decode").judgement == "better"
    assert change(faster, results(row("GPTQ")), "decode_speedup").judgement == "worse"
    smaller = results(row("GPTQ", replaced={"artifact": measured("artifact", 109e6, "bytes")}))
    found = change(results(row("GPTQ")), smaller, "artifact")
    assert (found.judgement, found.low, found.high) == ("better", -1e6, -1e6)


@pytest.mark.parametrize(
    ("metric", "unit", "judgement"),
    [("token_time", "s", "worse"), ("prefill/512", "tok/s", "better"), ("acceptance", "fraction", "better")],
)
def test_every_column_that_has_a_better_end_is_judged(metric: str, unit: str, judgement: str) -> None:
    before, after = (
        results(row("GPTQ", replaced={metric: measured(metric, value, unit, spread=0.01)})) for value in (0.5, 0.6)
    )
    assert change(before, after, metric).judgement == judgement


def test_another_prompt_is_told_of_a_ratio_at_a_length_too() -> None:
    before, after = (
        results(
            row("GPTQ", replaced={"prefill/512": measured("prefill/512", 50.0, "tok/s", spread=0.1, settings=given)}),
            baseline=baseline_row({"prefill/512": measured("prefill/512", 25.0, "tok/s", spread=0.1, settings=given)}),
        )
        for given in (WORK, {**WORK, "threads": 1})
    )
    assert "threads" in change(before, after, "prefill_speedup/512").reason


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (with_kl(0.5, None), "measured once"),
        (with_kl(0.5, engine="llama.cpp"), "computed by None before, by llama.cpp now"),
        (with_kl(0.5, settings={"length": 512}), "measured with another length"),
        (with_kl(0.5, metrics_version=METRICS_VERSION + 1), f"metrics_version {METRICS_VERSION} before"),
        (results(row("GPTQ", without={"kl": "no text"})), "not measured now: no text"),
    ],
)
def test_what_is_not_comparable_says_why(after: Results, reason: str) -> None:
    found = change(with_kl(0.08), after, "kl")
    assert found.judgement == "cannot tell" and reason in found.reason


def test_settings_of_speed_count_for_its_ratio_too() -> None:
    other = {**WORK, "threads": 1}
    after = results(row("GPTQ", replaced={"decode": measured("decode", 90.0, "tok/s", spread=0.1, settings=other)}))
    for metric in ("decode", "decode_speedup"):
        assert "threads" in change(results(row("GPTQ")), after, metric).reason


def test_another_machine_says_nothing_of_speed_but_of_bytes() -> None:
    before, after = (
        results(row("GPTQ")),
        results(row("GPTQ", replaced={"artifact": measured("artifact", 1e6, "bytes")})),
    )
    after = after.model_copy(update={"environment": {"device": "cuda"}})
    assert change(before, after, "decode").reason == "measured on another machine: device"
    assert change(before, after, "artifact").judgement == "better"


def test_rows_come_and_go() -> None:
    found = compare_runs(results(row("GPTQ"), row("NF4")), results(row("GPTQ"), row("AWQ")))
    assert (found.gone, found.new) == (["NF4"], ["AWQ"])
    assert {it.row for it in found.changes} == {"FP16", "GPTQ"}


def test_another_model_is_refused_and_the_same_one_from_a_hub_is_not() -> None:
    other = results(row("GPTQ")).model_copy(update={"model": "Llama"})
    with pytest.raises(DataError, match="different models: SmolLM2-135M-Instruct and Llama"):
        compare_runs(results(row("GPTQ")), other)
    hub = other.model_copy(update={"model": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    assert compare_runs(results(row("GPTQ")), hub).changes


def test_a_slower_baseline_is_shown_and_fails_nothing() -> None:
    slow = results(row("GPTQ"), baseline=baseline_row({"first_token": measured("first_token", 0.5, "s", spread=0.01)}))
    found = compare_runs(results(row("GPTQ")), slow)
    assert change(results(row("GPTQ")), slow, "first_token", "FP16").judgement == "worse"
    assert worse(found) is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, given in zip(paths, (with_kl(0.08), with_kl(0.2)), strict=True):
        Path(path).write_text(given.model_dump_json())
    assert cli.execute(["diff", *paths]) == 0
    shown = capsys.readouterr()
    assert "Worse" in shown.out and "+0.1200 [+0.1145, +0.1255]" in shown.out and shown.err == ""
    assert cli.execute(["diff", *paths, "--fail-on-worse", "--json"]) == 5
    failed = capsys.readouterr()
    assert {it["judgement"] for it in json.loads(failed.out)["changes"]} == {"same", "worse"}
    assert failed.err.startswith("error: worse than before\nGPTQ: KL to baseline 0.0800 nats to 0.2000 nats")
    assert cli.execute(["diff", *reversed(paths), "--fail-on-worse"]) == 0
