"""`run` from a suite to a report: what the manifests know reaches the page, gates are judged, cards are filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit import jobs, report
from quantkit.bench.measurement import Results
from quantkit.manifest import read_manifest
from quantkit.progress import Progress
from quantkit.verification import verify
from report.results_samples import results, row

SUITE = """
schema_version: 1
name: tiny
recipes:
  - {recipe: gguf-q8_0, label: Q8}
bench:
  - {name: memory}
"""


def test_layers_and_recipe_go_from_the_manifest_into_the_report(tiny_llama: Path, tmp_path: Path) -> None:
    suite = tmp_path / "tiny.yaml"
    suite.write_text(SUITE)
    out = tmp_path / "out"
    jobs.run(
        str(suite),
        model=str(tiny_llama),
        out=out,
        settings=(),
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
    )
    (row,) = report.load(out / "results.json").rows
    manifest = read_manifest(out / "artifacts" / "Q8")
    assert manifest is not None
    assert row.recipe == manifest.recipe
    assert [(layer.name, layer.sqnr_db) for layer in row.layers] == [(t.name, t.sqnr_db) for t in manifest.tensors]
    assert len(row.layers) >= 14
    page = (out / "report.html").read_text()
    assert "model.layers.1.mlp.down_proj" in page and "name: ggml" in page
    assert (out / "plots" / "sqnr-Q8.svg").is_file()
    assert {path.name for path in out.iterdir()} >= {"report.md", "report.html", "report.json", "results.json"}


GATED = """name: s
recipes: [{recipe: nf4, label: NF4 plain}]
bench: [{name: memory}]
gates: [{row: NF4 plain, max_kl: 0.05}, {min_recovery: 0.95}, {max_bytes: 110MB}]
"""


def bench(artifacts: list[Path], *, labels: list[str], **settings: Any) -> Results:
    """A row for each artifact, as if it had been measured."""
    rows = []
    for path, label in zip(artifacts, labels, strict=True):
        manifest = read_manifest(path)
        assert manifest is not None
        rows.append(row(label).model_copy(update={"artifact": path.name, "method": manifest.method}))
    return results(*rows)


def test_a_suite_ends_with_its_gates_and_filled_cards(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quantkit.bench.runner.bench", bench)
    suite, out = tmp_path / "suite.yaml", tmp_path / "out"
    suite.write_text(GATED)
    found = jobs.run(
        str(suite), model=str(tiny_llama), out=out, settings=[], device="cpu", force=False, progress=Progress()
    )
    assert [(it.bar, it.verdict) for it in found.gates] == [
        ("max_kl", "failed"),
        ("min_recovery", "warned"),
        ("max_bytes", "passed"),
    ]
    assert "warning: NF4 plain: accuracy recovered" in capsys.readouterr().err
    assert report.load(out / "results.json") == found
    assert "gate failed: NF4 plain: KL to baseline" in (out / "report.md").read_text()
    artifact = out / "artifacts" / "NF4-plain"
    manifest = read_manifest(artifact)
    assert manifest is not None and verify(artifact).findings == []
    assert "| NF4 plain |" in (artifact / "README.md").read_text()
