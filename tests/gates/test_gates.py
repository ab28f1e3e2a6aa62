"""Gates fail when the measurement is sure, warn when it is not, and pass otherwise; each output says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from quantkit import cli
from quantkit.bench.measurement import Results
from quantkit.errors import UsageError
from quantkit.gates.judge import failure, judge, warnings
from quantkit.gates.outcome import GateOutcome
from quantkit.recipe import load_suite
from quantkit.sections import GateSection
from report.results_samples import BASELINE_SAMPLES, measured, results, row

Captured = pytest.CaptureFixture[str]


def judged(given: Results, **bars: Any) -> GateOutcome:
    (outcome,) = judge(given, [GateSection.model_validate(bars)])
    return outcome


# the sample's KL is 0.080 with a standard error of 0.002: [0.0761, 0.0839]
@pytest.mark.parametrize(("bar", "verdict"), [(0.05, "failed"), (0.082, "warned"), (0.078, "warned"), (0.1, "passed")])
def test_the_interval_decides(bar: float, verdict: str) -> None:
    outcome = judged(results(row("GPTQ")), max_kl=bar)
    assert outcome.verdict == verdict
    assert (outcome.low, outcome.high) == pytest.approx((0.08 - 1.96 * 0.002, 0.08 + 1.96 * 0.002))
    assert (failure([outcome]) is not None) == (verdict == "failed")
    assert bool(warnings([outcome])) == (verdict == "warned")


# decode: 36 over 24, spreads of 1% and 2%: 1.5 ± 0.0335
@pytest.mark.parametrize(("bar", "verdict"), [(1.6, "failed"), (1.52, "warned"), (1.48, "warned"), (1.0, "passed")])
def test_a_lower_bar_is_held_from_the_other_side(bar: float, verdict: str) -> None:
    assert judged(results(row("GPTQ")), min_speedup=bar).verdict == verdict


# 55 of 100 where the baseline has 60; five answers changed, all for the worse
@pytest.mark.parametrize(("bar", "verdict"), [(0.99, "failed"), (0.95, "warned"), (0.5, "passed")])
def test_recovery_has_the_interval_of_the_report(bar: float, verdict: str) -> None:
    outcome = judged(results(row("GPTQ")), min_recovery=bar)
    assert outcome.verdict == verdict
    assert outcome.low is not None and outcome.high is not None and outcome.low < 55 / 60 < outcome.high


@pytest.mark.parametrize(("bar", "verdict"), [("109999999", "failed"), ("110MB", "passed"), ("104.9MiB", "failed")])
def test_bytes_are_counted_so_a_gate_on_them_never_warns(bar: str, verdict: str) -> None:
    assert judged(results(row("GPTQ")), max_bytes=bar).verdict == verdict


def test_what_was_not_measured_fails_with_the_reason() -> None:
    given = results(row("GPTQ", without={"decode": "gptqmodel is not installed"}))
    outcome = judged(given, min_speedup=1.0)
    assert (outcome.verdict, outcome.value) == ("failed", None)
    assert "n/a, bar at least 1.00 ×: not measured: gptqmodel is not installed" in outcome.sentence


@pytest.mark.parametrize("bar", [0.01, 1.0])
def test_a_single_run_is_never_sure(bar: float) -> None:
    given = results(row("GPTQ", replaced={"kl": measured("kl", 0.08, "nats")}))
    outcome = judged(given, max_kl=bar)
    assert outcome.verdict == "warned" and "measured once" in outcome.reason


def test_a_section_may_name_a_row() -> None:
    given = results(row("GPTQ"), row("AWQ"))
    sections = [GateSection(row="AWQ", max_kl=0.05), GateSection(max_kl=0.1)]
    assert [(it.row, it.verdict) for it in judge(given, sections)] == [
        ("AWQ", "failed"),
        ("GPTQ", "passed"),
        ("AWQ", "passed"),
    ]
    with pytest.raises(UsageError, match='no row "NF4"; it has GPTQ, AWQ'):
        judge(given, [GateSection(row="NF4", max_kl=1)])


# the command


def write(given: Results, path: Path) -> str:
    path.write_text(given.model_dump_json())
    return str(path)


@pytest.mark.parametrize("where", ["file/gates.xml", "folder", "/proc/gates.xml"])
def test_a_place_where_no_file_can_be_is_told(where: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    path = write(results(row("GPTQ")), tmp_path / "r.json")
    assert cli.execute(["gate", path, "--max-kl", "0.05", "--junit", str(tmp_path / where)]) == 2
    assert str(tmp_path / where) in capsys.readouterr().err


def test_one_fails_one_warns_one_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    steps = tmp_path / "summary.md"
    steps.write_text("earlier\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(steps))
    without = row("A & <B>", without={"kl": "its engine & all"})
    path, junit = write(results(row("GPTQ"), without), tmp_path / "r.json"), tmp_path / "new" / "gates.xml"
    arguments = ["gate", path, "--max-kl", "0.05", "--min-recovery", "0.95", "--max-bytes", "110MB"]
    assert cli.execute([*arguments, "--junit", str(junit), "--github-summary", "--json"]) == 5
    captured = capsys.readouterr()
    outcomes = {(it["row"], it["bar"]): it for it in json.loads(captured.out)}
    assert {key[1]: it["verdict"] for key, it in outcomes.items() if key[0] == "GPTQ"} == {
        "min_recovery": "warned",
        "max_kl": "failed",
        "max_bytes": "passed",
    }
    assert captured.err.count("warning: ") == 2
    assert "error: 2 of 6 gates failed\nGPTQ: KL to baseline 0.0800 [0.0761, 0.0839] nats" in captured.err
    suite = ElementTree.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "1", "1")
    cases = {(case.get("classname"), case.get("name")): case for case in suite}
    assert cases["GPTQ", "KL to baseline at most 0.0500 nats"][0].tag == "failure"
    unmeasured = cases["A & <B>", "KL to baseline at most 0.0500 nats"][0]
    assert unmeasured.tag == "error" and "its engine & all" in str(unmeasured.get("message"))
    assert cases["GPTQ", "accuracy recovered at least 95.0 %"][0].tag == "system-out"
    assert len(cases["GPTQ", "artifact at most 110 MB"]) == 0
    summary = steps.read_text()
    assert summary.startswith("earlier\n# demo\n")
    assert "| GPTQ" in summary and "## Failed" in summary and "## Warnings" in summary


def test_a_warning_alone_is_no_failure(tmp_path: Path, capsys: Captured) -> None:
    path = write(results(row("GPTQ"), row("AWQ")), tmp_path / "r.json")
    assert cli.execute(["gate", path, "--max-kl", "0.082", "--row", "AWQ"]) == 0
    captured = capsys.readouterr()
    assert "AWQ" in captured.out and "warned" in captured.out and "GPTQ" not in captured.out
    assert captured.err.startswith("warning: AWQ: KL to baseline 0.0800")
    assert cli.execute(["gate", path, "--max-kl", "1", "--min-speedup", "1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no gate: neither a bar"),
        (["--max-kl", "-1"], "--max-kl: "),
        (["--max-bytes", "much"], 'found "much", expected a size'),
        (["--max-kl", "1", "--row", "X"], 'no row "X"'),
        (["--max-kl", "1", "--github-summary"], "GITHUB_STEP_SUMMARY is not set"),
    ],
)
def test_what_is_no_gate_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert cli.execute(["gate", write(results(row("GPTQ")), tmp_path / "r.json"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_bar_the_gates_of_the_run_speak(tmp_path: Path, capsys: Captured) -> None:
    given = results(row("GPTQ"))
    given = given.model_copy(update={"gates": judge(given, [GateSection(max_kl=0.05)])})
    assert cli.execute(["gate", write(given, tmp_path / "r.json")]) == 5
    assert "KL to baseline" in capsys.readouterr().out


# suites


def suite(folder: Path, gates: str) -> str:
    path = folder / "suite.yaml"
    entries = "recipes: [{recipe: nf4, label: NF4}]\nbench: [{name: memory}]\n"
    path.write_text(f"name: s\n{entries}gates: {gates}\n")
    return str(path)


def test_a_suite_has_gates(tmp_path: Path) -> None:
    loaded = load_suite(suite(tmp_path, "[{row: NF4, max_bytes: 90MB}, {max_kl: 0.1}]"))
    assert [section.bars() for section in loaded.gates] == [{"max_bytes": 90_000_000}, {"max_kl": 0.1}]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("[{row: NF4}]", "gates.0: no bar"),
        ("[{row: GPTQ, max_kl: 1}]", 'gates.0.row: found "GPTQ", expected a label: NF4'),
        ("[{max_bytes: much}]", 'gates.0.max_bytes: found "much", expected a size'),
        ("[{max_kl: 1, min_kl: 1}]", "gates.0.min_kl: unknown key"),
    ],
)
def test_gates_of_a_suite_are_checked_before_it_runs(
    gates: str, message: str, tmp_path: Path, capsys: Captured
) -> None:
    assert cli.execute(["recipes", "validate", suite(tmp_path, gates)]) == 2
    assert message in capsys.readouterr().err


def test_the_report_of_a_run_tells_what_its_gates_said(tmp_path: Path) -> None:
    from quantkit import report

    given = results(row("GPTQ", samples=BASELINE_SAMPLES))
    given = given.model_copy(update={"gates": judge(given, [GateSection(max_kl=0.05)])})
    report.rebuild([Path(write(given, tmp_path / "r.json"))], tmp_path / "out")
    assert "gate failed: GPTQ: KL to baseline 0.0800" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_shows_its_table_before_it_fails(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    from quantkit import jobs

    given = results(row("GPTQ"))
    given = given.model_copy(update={"gates": judge(given, [GateSection(max_kl=0.05)])})
    monkeypatch.setattr(jobs, "run", lambda *arguments, **settings: given)
    assert cli.execute(["run", "demo", "--json"]) == 5
    captured = capsys.readouterr()
    assert json.loads(captured.out)["gates"][0]["verdict"] == "failed", "one document, the results"
    assert captured.err.startswith("error: 1 of 1 gates failed\nGPTQ: KL to baseline")
    assert cli.execute(["run", "demo"]) == 5
    assert "Summary" in capsys.readouterr().out
