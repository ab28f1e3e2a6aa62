"""`run` from a suite to a report: what the manifests know of the artifacts reaches the page."""

from __future__ import annotations

from pathlib import Path

from quantkit import jobs, report
from quantkit.manifest import read_manifest
from quantkit.progress import Progress

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
