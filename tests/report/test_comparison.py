"""Hand-written results become the lines, ratios, reasons and verdicts that they must become."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.bench.measurement import Measurement, Results, Row
from quantkit.report.comparison import compare, missing_reasons
from quantkit.report.intervals import another_run
from quantkit.report.layout import lay_out
from quantkit.report.model import Comparison, Verdict
from report.results_samples import baseline_row, measured, missing, results, row


def only(*given: Results) -> Comparison:
    comparisons = compare(given)
    assert len(comparisons) == 1
    return comparisons[0]


def value(comparison: Comparison, label: str, key: str) -> float | None:
    line = next(line for line in comparison.lines if line.label == label)
    return line.cells[key].value


def test_the_baseline_is_first_and_compared_with_nothing() -> None:
    comparison = only(results(row("NF4")))
    assert [line.label for line in comparison.lines] == ["FP16", "NF4"]
    assert comparison.lines[0].baseline and not comparison.lines[1].baseline
    assert not {"memory_saved", "decode_speedup", "recovered"} & comparison.lines[0].cells.keys()


def test_ratios_are_against_the_baseline() -> None:
    comparison = only(results(row("NF4")))
    assert value(comparison, "NF4", "memory_saved") == pytest.approx(1 - 110 / 270)
    assert value(comparison, "NF4", "decode_speedup") == pytest.approx(36 / 24)
    assert value(comparison, "NF4", "recovered") == pytest.approx(0.55 / 0.6)
    assert value(comparison, "NF4", "quantize") == 3.0
    speedup = comparison.lines[1].cells["decode_speedup"]
    # relative spreads of 0.36 / 36 and 0.48 / 24 in quadrature
    assert speedup.spread == pytest.approx(1.5 * (0.01**2 + 0.02**2) ** 0.5)


def test_speeds_of_several_processes_are_compared_round_by_round() -> None:
    slow, fast = [20.0, 24.0, 30.0, None], [30.0, 37.2, 45.0, 36.0]
    base = baseline_row({"decode": measured("decode", 24.0, "tok/s", spread=5.0, rounds=slow)})
    ours = row("NF4", replaced={"decode": measured("decode", 36.6, "tok/s", rounds=fast)})
    (comparison,) = compare([results(ours, baseline=base)], price_per_hour=3.6)
    before, after = (line.cells["decode"] for line in comparison.lines)
    assert (before.low, before.high) == another_run([20.0, 24.0, 30.0])
    speedup = comparison.lines[1].cells["decode_speedup"]
    assert speedup.value == 1.5  # of 1.5, 1.55 and 1.5
    assert (speedup.low, speedup.high) == another_run([1.5, 1.55, 1.5])
    # the machine was half as fast again in one round as in another, and that was the same for both
    assert speedup.low is not None and speedup.low > 1.35 and after.low is not None and after.low < 30
    cost = comparison.lines[1].cells["decode_cost"]  # 1000 a second, by the rate
    assert after.high is not None and cost.low == pytest.approx(1000 / after.high)
    assert cost.high == pytest.approx(1000 / after.low)


def test_recovered_has_an_interval_and_says_how_many_answers_changed() -> None:
    cell = only(results(row("NF4"))).lines[1].cells["recovered"]
    assert cell.low is not None and cell.high is not None and cell.value is not None
    assert cell.low < cell.value < cell.high
    assert cell.samples == 100
    assert value(only(results(row("NF4"))), "NF4", "changed") == pytest.approx(0.05)


def test_without_matching_questions_there_is_no_interval() -> None:
    changed = row("NF4").model_copy(update={"samples": {"piqa": [1.0, 0.0]}})
    cell = only(results(changed)).lines[1].cells["recovered"]
    assert cell.value is not None and cell.low is None
    assert cell.remarks == ("no interval: no matching per-question scores for piqa",)


def test_no_changed_answer_is_not_sold_as_certainty() -> None:
    same = row("NF4", samples=baseline_row().samples["piqa"])
    (remark,) = only(results(same)).lines[1].cells["recovered"].remarks
    assert "more than 3 of them" in remark


def test_a_task_that_only_the_baseline_has_is_told() -> None:
    extra = measured("accuracy/arc_easy", 0.4, "fraction")
    base = baseline_row()
    base = base.model_copy(update={"measurements": [*base.measurements, extra]})
    cell = only(results(row("NF4"), baseline=base)).lines[1].cells["recovered"]
    assert cell.remarks == ("over piqa alone; the baseline was measured on 2 tasks",)


def test_missing_numbers_keep_their_reason() -> None:
    reason = "gptqmodel is not installed"
    comparison = only(results(row("GPTQ", name="gptq", without={"decode": reason})))
    cell = comparison.lines[1].cells["decode"]
    assert (cell.value, cell.missing) == (None, reason)
    assert comparison.lines[1].cells["decode_speedup"].missing == reason
    assert missing_reasons(comparison)[reason] == [("GPTQ", "decode")]


def test_speeds_of_different_work_are_not_divided() -> None:
    other = measured("decode", 50.0, "tok/s", settings={"batch_size": 1, "prompt_tokens": 512, "decode_tokens": 32})
    cell = only(results(row("NF4", replaced={"decode": other}))).lines[1].cells["decode_speedup"]
    assert cell.value is None
    assert cell.missing == "the baseline was measured with another prompt_tokens"


def test_every_batch_size_has_its_column() -> None:
    many = measured("decode", 90.0, "tok/s", settings={"batch_size": 4, "prompt_tokens": 128, "decode_tokens": 32})
    changed = row("NF4")
    changed = changed.model_copy(update={"measurements": [*changed.measurements, many]})
    comparison = only(results(changed))
    titles = [column.title for column in comparison.columns]
    assert "decode" in titles and "decode, batch 4" in titles
    assert comparison.lines[1].cells["decode_speedup@4"].missing == ("the baseline has no such speed: not measured")


def test_a_metric_that_the_report_does_not_know_is_shown() -> None:
    changed = row("NF4")
    changed = changed.model_copy(
        update={"measurements": [*changed.measurements, measured("sharpness", 3.25, "points")]}
    )
    comparison = only(results(changed))
    assert ("sharpness", "points") in [(column.title, column.unit) for column in comparison.columns]
    quality = next(part for part in lay_out(comparison).parts if part.title == "Quality")
    assert "sharpness points" in quality.headers  # type: ignore[union-attr]


def test_one_model_and_machine_become_one_table() -> None:
    comparison = only(results(row("NF4")), results(row("NF4"), row("AWQ", name="awq"), name="second"))
    assert [line.label for line in comparison.lines] == ["FP16", "NF4", "NF4 (second)", "AWQ"]
    assert "from 2 result files" in comparison.notes[0]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"environment": {"device": "cuda"}},
        {"settings": {"divergence": {"sequences": 99}}},
        {"baseline": "perplexity"},
    ],
)
def test_what_cannot_be_compared_stays_apart(change: dict[str, Any]) -> None:
    if change == {"baseline": "perplexity"}:
        change = {"baseline": baseline_row(replaced={"perplexity": measured("perplexity", 21.5, "")})}
    other = results(row("AWQ", name="awq")).model_copy(update=change)
    assert len(compare([results(row("NF4")), other])) == 2


def verdicts(given: Row, environment: dict[str, Any] | None = None) -> dict[str, Verdict]:
    result = results(given)
    if environment:
        result = result.model_copy(update={"environment": environment})
    return {verdict.quantity: verdict for verdict in only(result).verdicts}


def test_verdict_on_memory_breaks_the_bytes_down() -> None:
    verdict = verdicts(row("NF4"))["memory saved"]
    assert verdict.judgement == "parts"
    # 6.5 = share * 16 + (1 - share) * 4.13
    assert "as if 20% of the parameters" in verdict.reason
    close = row("NF4", replaced={"artifact": measured("artifact", 72e6, "bytes")})
    assert verdicts(close)["memory saved"].judgement == "agrees"


def test_verdict_on_a_slower_int8_says_what_the_numbers_say() -> None:
    slow = row("INT8", name="int8", replaced={"decode": measured("decode", 6.0, "tok/s")})
    verdict = verdicts(slow)["faster"]
    assert verdict.judgement == "parts"
    assert verdict.measured == pytest.approx(-0.75)
    assert "a token takes 4.0 times as long on cpu" in verdict.reason
    assert "115 MB instead of 284" in verdict.reason


def test_verdict_on_speed_holds_the_spread() -> None:
    inside = row("NF4", replaced={"decode": measured("decode", 24 * 1.31, "tok/s", spread=1.0)})
    assert verdicts(inside)["faster"].judgement == "agrees"
    outside = row("NF4", replaced={"decode": measured("decode", 24 * 1.6, "tok/s", spread=1.0)})
    assert verdicts(outside)["faster"].judgement == "parts"


def test_verdict_on_speed_names_two_engines() -> None:
    gguf = row("GGUF", name="ggml", replaced={"decode": measured("decode", 60.0, "tok/s", engine="llama.cpp")})
    assert "run by llama.cpp, the baseline by transformers" in verdicts(gguf)["faster"].reason


def test_verdict_on_accuracy_knows_when_it_cannot_tell() -> None:
    base = baseline_row().samples["piqa"]
    noisy = [1 - score if place % 4 == 0 else score for place, score in enumerate(base)]
    assert verdicts(row("NF4", samples=noisy))["accuracy kept"].judgement == "cannot tell"
    worse = [0.0 if place % 2 else score for place, score in enumerate(base)]
    verdict = verdicts(row("NF4", samples=worse))["accuracy kept"]
    assert verdict.judgement == "parts"
    assert "KL to the baseline is 0.080 nats" in verdict.reason
    assert "this one has 135M" in verdict.reason


def test_an_unmeasured_claim_is_not_judged() -> None:
    verdict = verdicts(row("GPTQ", name="gptq", without={"decode": "no engine"}))["faster"]
    assert (verdict.judgement, verdict.measured, verdict.reason) == ("not measured", None, "no engine")


def test_four_bit_rules_are_not_held_against_eight_bits() -> None:
    eight = row("Q8_0", name="ggml", replaced={"bits_per_weight": measured("bits_per_weight", 8.5, "bits/weight")})
    assert only(results(eight)).verdicts == ()
    assert only(results(row("mystery", name="mystery"))).verdicts == ()


def test_missing_and_measured_are_told_apart() -> None:
    gone = missing("kl", "nats", "no text")
    assert isinstance(gone, Measurement)
    comparison = only(results(row("NF4", replaced={"kl": gone})))
    assert missing_reasons(comparison) == {
        "no text": [("NF4", "KL to baseline")],
        "no GPU": [("FP16", "peak VRAM"), ("NF4", "peak VRAM")],
    }
