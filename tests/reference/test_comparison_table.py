"""The document of a comparison: medians and spreads, reasons, the floor; and the file it is read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import DataError
from quantkit.reference.results import ComparisonResults, Cost, EngineRow, Figure, Floor
from quantkit.reference.table import document, load
from quantkit.report.layout import Listing, TextTable
from quantkit.report.markdown import document_markdown


def _cost(wall: float, quantize: float | None = None) -> Cost:
    return Cost(wall_s=wall, cpu_s=2 * wall, peak_rss_bytes=500_000_000, quantize_s=quantize)


def _results(rows: list[EngineRow], **more: Any) -> ComparisonResults:
    evaluation = {"set": "test.txt", "sequences": 4, "length": 64}
    settings = {
        "recipe": {"calibration": {"sequences": 8, "length": 64}},
        "calibration": {"set": "train.txt", "fingerprint": "f"},
        "evaluation": evaluation,
        "runs": 3,
    }
    machine = {"cpu": "CPU", "cores": 2, "threads": 2, "python": "3.11", "packages": {"torch": "2"}}
    given: dict[str, Any] = {"name": "t", "created": "2026-01-02T03", "model": "m", "job": "gptq 4-bit g64 sym"}
    return ComparisonResults(**(given | {"rows": rows, "settings": settings, "environment": machine} | more))


OURS = EngineRow(
    engine="quantkit",
    label="ours",
    settings={"propagate": "quantized"},
    runs=[_cost(12.0, 8.0), _cost(10.0, 6.0), _cost(20.0, 7.0)],
    format="autogptq",
    bytes=113_000_000,
    bits_per_weight=4.25,
    perplexity=Figure(value=30.123, error=1.5),
    kl=Figure(value=0.12345, error=0.00678),
    top1=Figure(value=0.801, error=0.006),
)
PEER = EngineRow(
    engine="peer",
    label="peer 1.0",
    runs=[_cost(48.0, 40.0).model_copy(update={"load_s": 0.5, "save_s": 1.5})],
    reason="run 2: stopped after 60 s",
)
ABSENT = EngineRow(engine="other", label="other 2.0", reason="needs a GPU")


def _parts(results: ComparisonResults) -> dict[str, TextTable | Listing]:
    return {part.title: part for part in document(results).parts}


def test_the_calibration_is_told_by_what_was_used() -> None:
    """Which need not be what the first recipe says: it may have no use for one."""
    found = _results([OURS])
    assert "calibrated on 8 x 64 tokens of train.txt" in document(found).lead, "as older files have it"
    used = {"set": "train.txt", "sequences": 16, "length": 32, "seed": 0, "fingerprint": "f"}
    settings = found.settings | {"calibration": used}
    assert "calibrated on 16 x 32 tokens of train.txt" in document(_results([OURS], settings=settings)).lead


def test_medians_stand_beside_their_spread_and_times_are_compared_with_the_first_row() -> None:
    took = _parts(_results([OURS, PEER, ABSENT]))["What it took"]
    assert isinstance(took, TextTable)
    assert took.rows == [
        ["ours", "7.0 (6.0-8.0)", "7.0 (6.0-8.0)", "12.0 (10.0-20.0)", "24.0 (20.0-40.0)", "500", "1.00×"],
        ["peer 1.0", "40.0", "42.0", "48.0", "96.0", "500", "4.00×"],
    ]


def test_quality_has_its_errors_and_what_is_not_known_is_a_dash() -> None:
    gave = _parts(_results([OURS, PEER]))["What it gave"]
    assert isinstance(gave, TextTable)
    assert gave.rows == [
        ["ours", "autogptq", "113.0", "4.250", "30.12 ±1.50", "0.1235 ±0.0068", "80.1 ±0.6"],
        ["peer 1.0", "-", "-", "-", "-", "-", "-"],
    ]


def test_every_reason_is_told_and_nothing_is_timed_that_did_not_run() -> None:
    parts = _parts(_results([ABSENT]))
    assert list(parts) == ["What did not work"]
    both = _parts(_results([OURS, PEER, ABSENT]))["What did not work"]
    assert isinstance(both, Listing)
    assert both.items == ["peer 1.0: run 2: stopped after 60 s", "other 2.0: needs a GPU"]


def test_each_row_is_held_against_the_floor() -> None:
    floor = Floor(gemm_flop_per_s=1e12, one_pass_flop=2 * 10**12, two_pass_flop=35 * 10**11)
    listing = _parts(_results([OURS, ABSENT], floor=floor))["The floor"]
    assert isinstance(listing, Listing)
    assert listing.items[0] == "float32 products run at 1000 GFLOP/s here"
    assert listing.items[1].endswith("2.00 TFLOP, 2.0 s") and listing.items[2].endswith("3.50 TFLOP, 3.5 s")
    assert listing.items[3:] == ["ours: 3.50 times the floor of one pass, 2.00 times that of two"]


def test_a_results_file_is_read_back_and_others_are_refused(tmp_path: Path) -> None:
    results = _results([OURS, ABSENT])
    path = tmp_path / "r.json"
    path.write_text(results.model_dump_json())
    assert load(path) == results
    assert "| ours " in document_markdown(document(load(path)))
    path.write_text('{"schema_version": 99}')
    with pytest.raises(DataError, match="schema_version is 99; expected 1"):
        load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load(path)
    with pytest.raises(DataError, match="No such file"):
        load(tmp_path / "gone.json")
