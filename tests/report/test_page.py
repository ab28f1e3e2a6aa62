"""The HTML page as text: all of the report is in it, nothing is fetched, nothing is taken for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from quantkit import report
from quantkit.bench.measurement import Layer, Results
from quantkit.cli import execute
from quantkit.report.model import Report
from report.results_samples import missing, results, row

VOID = {"meta", "link", "br", "circle", "path", "rect"}


class Checker(HTMLParser):
    """Collects text, ids and links, and refuses tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        self.links += [value for key, value in attrs if key in ("href", "src") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def demo() -> Results:
    layers = [
        Layer(name=f"model.layers.{n}.q_proj", applied="gptq", bits_per_weight=4.5, sqnr_db=20.0 + n) for n in range(3)
    ]
    return results(
        row("INT8", name="int8"),
        row("GPTQ <b>|&", name="gptq", without={"decode": "gptqmodel is not installed"}).model_copy(
            update={
                "fallbacks": ["model.layers.0.mlp.up_proj: damping rose to 0.1"],
                "layers": layers,
                "recipe": {"method": {"name": "gptq", "bits": 4}},
            }
        ),
    )


def made(tmp_path: Path, *given: Results, price: float | None = None) -> Path:
    paths = []
    for place, result in enumerate(given):
        paths.append(tmp_path / f"{place}.json")
        paths[-1].write_text(result.model_dump_json())
    report.rebuild(paths, tmp_path / "out", price_per_hour=price)
    return tmp_path / "out"


def checked(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == []
    return checker


def test_the_page_is_well_formed_and_says_everything(tmp_path: Path) -> None:
    found = checked(made(tmp_path, demo()) / "report.html")
    for said in (
        "SmolLM2-135M-Instruct",
        "GPTQ <b>|&",
        "The rule of thumb beside the measurement",
        "gptqmodel is not installed",
        "damping rose to 0.1",
        "no GPU (every line: peak VRAM)",
        "packages.torch",
        "name: gptq",
        "model.layers.2.q_proj",
        "22.0",
        "KL to baseline, nats (↓ better)",
    ):
        assert said in found.text, said


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = made(tmp_path, demo(), demo().model_copy(update={"name": "second", "model": "another"})) / "report.html"
    found = checked(page)
    assert [link for link in found.links if not link.startswith(("#", "data:,"))] == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page.read_text())
    assert "default-src 'none'" in page.read_text()


def test_footnotes_lead_to_their_notes_in_the_same_report(tmp_path: Path) -> None:
    other = demo().model_copy(update={"name": "second", "model": "another"})
    found = checked(made(tmp_path, demo(), other) / "report.html")
    marks = [link[1:] for link in found.links if link.startswith("#")]
    assert {mark.split("n")[0] for mark in marks} == {"r1", "r2"}
    assert set(marks) <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_a_price_becomes_a_cost_of_tokens(tmp_path: Path) -> None:
    out = made(tmp_path, demo(), price=1.2)
    (comparison,) = json.loads((out / "report.json").read_text())["comparisons"]
    cells = comparison["lines"][1]["cells"]
    # 36 tokens a second are 129600 an hour
    assert cells["decode_cost"]["value"] == pytest.approx(1.2 / 129600 * 1e6)
    assert cells["decode_cost"]["spread"] == pytest.approx(1.2 / 129600 * 1e6 * 0.01)
    assert cells["decode_cost"]["low"] is None and cells["decode_cost"]["high"] is None
    assert comparison["lines"][2]["cells"]["decode_cost"]["missing"] == "gptqmodel is not installed"
    assert "cost, generated" in (out / "report.html").read_text()
    assert "at 1.2 an hour" in (out / "report.md").read_text()
    assert not [reason for reason in comparison["notes"] if "cost" in reason and "1.2" not in reason]


def test_plots_that_have_nothing_to_show_any_more_are_removed(tmp_path: Path) -> None:
    out = made(tmp_path, demo())
    assert (out / "plots" / "kl-artifact.svg").is_file()
    (out / "plots" / "mine.png").write_text("x")
    gone = {"kl": missing("kl", "nats", "no text")}
    made(tmp_path, results(row("A", replaced=gone), row("B", replaced=gone)))
    assert not (out / "plots" / "kl-artifact.svg").exists()
    assert (out / "plots" / "mine.png").exists()


def fits(value: Any, schema: dict[str, Any], defs: dict[str, Any]) -> bool:
    """Whether a JSON value is what a schema describes: the part of JSON Schema that pydantic writes."""
    if "$ref" in schema:
        schema = defs[schema["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in schema:
        return any(fits(value, choice, defs) for choice in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    kind = schema.get("type")
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is not None and not isinstance(value, kinds[kind]):
        return False
    if kind == "array":
        return all(fits(item, schema.get("items", {}), defs) for item in value)
    if kind == "object":
        named = schema.get("properties", {})
        more = schema.get("additionalProperties", True)
        return set(schema.get("required", [])) <= value.keys() and all(
            fits(item, named[key], defs)
            if key in named
            else more is not False and fits(item, more or {}, defs)
            if isinstance(more, dict)
            else key in named or more is True
            for key, item in value.items()
        )
    return True


def test_the_document_is_what_the_published_schema_describes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path, demo(), price=1.2)
    assert execute(["report", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    content = json.loads((out / "report.json").read_text())
    assert fits(content, schema, schema["$defs"])
    Report.model_validate(content)
    content["comparisons"][0]["lines"][1]["cells"]["kl"]["value"] = "0.08"
    assert not fits(content, schema, schema["$defs"])


def test_the_command_prints_a_table_a_document_or_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text(demo().model_dump_json())
    assert execute(["report", str(path)]) == 0
    assert "Where measurement and folklore part" in capsys.readouterr().out
    assert execute(["report", str(path), "--json", "--price-per-hour", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["comparisons"][0]["price_per_hour"] == 2
    assert execute(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.splitlines()
    assert all(Path(line).is_file() for line in written)
    assert {Path(line).name for line in written} >= {"report.md", "report.html", "report.json", "kl-artifact.svg"}
    assert execute(["report"]) == 2
