"""What an artifact was made from: the source's hashes, and with `deep` sampled blocks made again, byte for byte."""

from __future__ import annotations

from quantkit.formats.base import ArtifactSource
from quantkit.manifest import Manifest
from quantkit.model.source import Source
from quantkit.verification.report import Report


def check_source(artifact: ArtifactSource, manifest: Manifest, model: str, report: Report, *, deep: bool) -> None:
    """Hold a model's hashes against those that the manifest recorded. deep: make blocks again where they agree.

    Raises ModelError when the model cannot be opened.
    """
    from quantkit.model.reader import open_source

    source = open_source(model)
    if not _check_hashes(source, manifest, report):
        report.skip("blocks made again: the source is another one than the manifest's")
        return
    if deep:
        from quantkit.verification.rederive import rederive

        rederive(artifact, manifest, source, report)


def _check_hashes(source: Source, manifest: Manifest, report: Report) -> bool:
    """Whether the weight files are those of the manifest, by their order of names: copies may be renamed."""
    files = source.lineage()["files"]
    found = sorted((file["sha256"], str(file["bytes"])) for file in files)
    recorded = manifest.source.get("files")
    if not isinstance(recorded, list) or not all(isinstance(file, dict) for file in recorded):
        report.skip("the source's hashes: the manifest has none")
        return False
    expected = sorted((str(file.get("sha256")), str(file.get("bytes"))) for file in recorded)
    if found == expected:
        report.count("source files", len(found))
        return True
    by_name = {str(file.get("name")): file for file in recorded}
    for file in files:
        if (file["sha256"], str(file["bytes"])) not in expected:
            wanted = by_name.get(file["name"], {}).get("sha256", "no file of this name")
            report.find(f"{source.path}: {file['name']}: found sha256 {file['sha256']}, expected {wanted}")
    if len(found) != len(expected):
        report.find(f"{source.path}: found {len(found)} weight files, expected {len(expected)} by the manifest")
    return False
