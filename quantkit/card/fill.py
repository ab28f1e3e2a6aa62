"""Puts the measured row of an artifact into its card, and takes the card into the manifest again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.card.text import BEGIN, END
from quantkit.card.write import with_files
from quantkit.errors import ModelError, UsageError
from quantkit.manifest import MANIFEST_NAME, Manifest, file_record, read_manifest, write_atomic, write_manifest
from quantkit.model.front_matter import CARD

if TYPE_CHECKING:
    from quantkit.bench.measurement import Results, Row

SHOWN = ("Summary", "Notes")


def fill_card(artifact: Path, results: Results | None, row: str | None = None) -> Path:
    """Replace the measured section of an artifact's card, and record the card in the manifest. Returns its path.

    results: what was measured; None leaves the text as it is and only records it, after somebody edited it. row: label
    of the artifact's row, found by its folder's name when None. Card and manifest are each replaced at once, the card
    first: an interruption between the two leaves a card that `verify` reports and the same command mends. Raises
    UsageError when there is no card or no such row, ModelError for a damaged card.
    """
    manifest = read_manifest(artifact)
    path = artifact / CARD
    if manifest is None or not path.is_file():
        missing = MANIFEST_NAME if manifest is None else CARD
        raise UsageError(f"{artifact}: no {missing}, expected an artifact that quantkit made", hint="quantkit quantize")
    if results is not None:
        found = _row(results, artifact, manifest, row)
        write_atomic(path, _filled(path, section(results, found)).encode())
    write_manifest(with_files(manifest, [file_record(path, artifact)]), artifact)
    return path


def _row(results: Results, artifact: Path, manifest: Manifest, label: str | None) -> Row:
    name = artifact.resolve().name
    rows = [it for it in results.rows if (it.artifact == name if label is None else it.label == label)]
    if len(rows) != 1:
        wanted = f"of an artifact {name}" if label is None else f"called {label}"
        known = ", ".join(it.label for it in results.rows)
        raise UsageError(f"{results.name}: {len(rows)} rows {wanted}; it has {known}", hint="name one with --row")
    if rows[0].method not in (None, manifest.method):
        raise UsageError(
            f"{results.name}: row {rows[0].label} is {rows[0].method}, the artifact {manifest.method}",
            hint="bench the artifact again",
        )
    return rows[0]


def section(results: Results, row: Row) -> str:
    """The baseline and one row as Markdown: the report's summary, its notes, and on what it was measured."""
    from quantkit.report.comparison import compare
    from quantkit.report.layout import lay_out
    from quantkit.report.markdown import document_markdown, escaped

    document = lay_out(compare([results.model_copy(update={"rows": [row]})])[0])
    parts = [part for part in document.parts if part.title in SHOWN]
    body = document_markdown(replace(document, parts=parts)).partition("\n## Summary\n")[2]
    machine = results.environment
    where = ", ".join(str(machine[key]) for key in ("gpu", "cpu") if machine.get(key))
    lead = f"Beside its source at full precision, measured on {where or 'a machine that is not recorded'}"
    threads = f", {machine['threads']} threads" if machine.get("threads") else ""
    return f"{escaped(lead + threads)}.\n\n{body.strip()}".replace("\n## ", "\n### ")


def _filled(path: Path, content: str) -> str:
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise ModelError(f"{path}: no {BEGIN} … {END}, which the results go between", hint="put the two lines back")
    return f"{before}{BEGIN}\n{content}\n{END}{behind}"
