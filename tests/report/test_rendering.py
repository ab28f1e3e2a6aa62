"""The report as a person sees it: aligned, complete, the same numbers in every form."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import report
from quantkit.bench.measurement import Results
from quantkit.errors import DataError, UsageError
from report.results_samples import missing, results, row


def demo() -> Results:
    return results(
        row("INT8", name="int8"),
        row("GPTQ | 4_bit_", name="gptq", without={"decode": "gptqmodel is not installed"}).model_copy(
            update={"fallbacks": ["model.layers.0.mlp.up_proj: damping rose to 0.1"], "notes": ["symmetric"]}
        ),
    )


def save(result: Results, path: Path) -> Path:
    path.write_text(result.model_dump_json())
    return path


@pytest.mark.parametrize("where", ["file", "file/report", "/proc/report"])
def test_a_place_where_no_folder_can_be_is_told(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / where))):
        report.rebuild([save(demo(), tmp_path / "results.json")], tmp_path / where)


def rebuilt(tmp_path: Path, *given: Results) -> str:
    paths = [save(result, tmp_path / f"{place}.json") for place, result in enumerate(given)]
    report.rebuild(paths, tmp_path / "out")
    return (tmp_path / "out" / "report.md").read_text()


def tables(text: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_markdown_tables_are_aligned(tmp_path: Path) -> None:
    found = tables(rebuilt(tmp_path, demo()))
    assert len(found) == 6
    for table in found:
        bars = [[match.start() for match in re.finditer(r"(?<!\\)\|", line)] for line in table]
        assert all(places == bars[0] for places in bars), "\n".join(table)


def test_layers_that_fell_back_alike_share_a_line(tmp_path: Path) -> None:
    reason = "gguf Q5_0: Q4_K has blocks of 256, which do not divide its 288 columns"
    lines = [*(f"model.layers.{layer}.mlp.up_proj: {reason}" for layer in range(30)), "lm_head: gguf Q8_0: other"]
    text = rebuilt(tmp_path, results(row("GGUF", name="ggml").model_copy(update={"fallbacks": lines})))
    assert f"- GGUF: model.layers.0.mlp.up_proj and 29 more: {reason}\n- GGUF: lm_head: gguf Q8_0: other\n" in text
    assert "31 layers did not get what the recipe asked" in text


def test_the_summary_marks_a_line_that_fell_back(tmp_path: Path) -> None:
    text = rebuilt(tmp_path, demo())
    marked = [line for line in tables(text)[0] if "[1]" in line]
    assert len(marked) == 1 and "4_bit" in marked[0].split("[1]")[0]
    assert "- [1] 1 layer did not get what the recipe asked: listed below" in text


def test_markdown_keeps_words_that_look_like_markup(tmp_path: Path) -> None:
    text = rebuilt(tmp_path, demo())
    assert r"GPTQ \| 4_bit\_" in text
    assert "dequantized Q4_1 baseline" in text


def test_report_shows_every_reason_and_fallback(tmp_path: Path) -> None:
    text = rebuilt(tmp_path, demo())
    assert "- [2] gptqmodel is not installed" in text
    assert "n/a [2]" in text
    assert "- no GPU (every line: peak VRAM)" in text
    assert "damping rose to 0.1" in text
    assert r"GPTQ | 4_bit\_: symmetric" in text
    assert "packages.torch: 2.13.0" in text
    assert "gptqmodel: None" not in text


def test_headers_carry_the_units(tmp_path: Path) -> None:
    header = tables(rebuilt(tmp_path, demo()))[0][0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "",
        "artifact MB",
        "saved %",
        "decode tok/s",
        "vs baseline ×",
        "perplexity",
        "KL nats",
        "recovered [95%] %",
        "quantize s",
    ]


def test_json_holds_numbers(tmp_path: Path) -> None:
    rebuilt(tmp_path, demo())
    (comparison,) = json.loads((tmp_path / "out" / "report.json").read_text())["comparisons"]
    cells = comparison["lines"][1]["cells"]
    assert cells["artifact"]["value"] == 110e6
    assert cells["decode_speedup"]["value"] == 1.5
    assert comparison["lines"][2]["cells"]["decode"] == cells["decode"] | {
        "value": None,
        "spread": None,
        "engine": None,
        "missing": "gptqmodel is not installed",
    }


def test_several_models_get_a_section_each(tmp_path: Path) -> None:
    other = demo().model_copy(update={"name": "second", "model": "another"})
    headings = re.findall(r"^# (.*)", rebuilt(tmp_path, demo(), other), flags=re.MULTILINE)
    assert headings == ["demo", "second"]


@pytest.mark.parametrize("width", [100, 60])
def test_piped_output_loses_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.report import screen

    monkeypatch.setattr(screen, "PIPED_WIDTH", width)
    stream = io.StringIO()
    report.show(demo(), stream=stream)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text
    size = text.split("Size and memory")[1].split("Where it runs")[0]
    for shown in ("110", "59.3", "4.13", "6.50", "115", "300 (3)", "1.50 (0.03)", "22.90 ± 0.90", "91.0 ± 0.3"):
        assert shown in size, shown


def test_renderable_can_be_made_again_and_again() -> None:
    from rich.console import Console

    for _ in range(2):
        stream = io.StringIO()
        Console(file=stream, width=100).print(report.terminal(demo()))
        assert "Where measurement and folklore part" in stream.getvalue()


def test_a_wide_table_is_cut_between_columns() -> None:
    stream = io.StringIO()
    report.show(demo(), stream=stream)
    speed = stream.getvalue().split("Speed\n")[1].split("Quality")[0]
    for line in speed.splitlines():
        if line.startswith("FP16"):
            assert re.match(r"FP16 +(\d|–)", line)


def test_a_line_without_any_speed_says_so() -> None:
    stream = io.StringIO()
    silent = row("X", without={"prefill": "no engine", "decode": "no engine"})
    report.show(
        results(silent.model_copy(update={"measurements": [*silent.measurements, missing("z", "", "no z")]})),
        stream=stream,
    )
    text = stream.getvalue()
    assert "no z (X: z)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "schema_version is None; expected 1"),
        ('{"schema_version": 99}', "schema_version is 99; expected 1"),
        ('{"schema_version": 1, "name": "x"}', "model: Field required"),
    ],
)
def test_bad_files_are_refused_by_name(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    good = save(demo(), tmp_path / "good.json")
    with pytest.raises(DataError, match=message) as caught:
        report.rebuild([good, path], tmp_path / "out")
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_needs_no_torch(tmp_path: Path) -> None:
    path = save(demo(), tmp_path / "results.json")
    program = (
        "import sys; from pathlib import Path; from quantkit import report; "
        f"report.rebuild([Path({str(path)!r})], Path({str(tmp_path / 'out')!r})); "
        f"report.show(report.load(Path({str(path)!r}))); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(report.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
