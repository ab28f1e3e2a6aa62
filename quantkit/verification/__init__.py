"""Whether an artifact is what it says it is: files, tensors, values, and what it was made from."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import ModelError, UsageError
from quantkit.verification.report import Report


def verify(path: Path, *, source: str | None = None, deep: bool = False) -> Report:
    """Check an artifact, a folder or a .gguf file, by quantkit or by another tool; whatever is wrong is a finding.

    source: the model that it was made from: a folder, a .gguf file or a hub id. deep: make sampled blocks again from
    the source and compare bytes. Raises ModelError when there is nothing to check: no such path, no known
    format; UsageError for deep without source.
    """
    from quantkit.formats import open_artifact, recognized
    from quantkit.verification.files import check_files
    from quantkit.verification.tensors import check_tensors

    if deep and source is None:
        raise UsageError("--deep: makes blocks again from the source; expected --source MODEL as well")
    if not path.exists():
        raise ModelError(f"{path}: no such artifact", hint="give the folder or the .gguf file that quantize wrote")
    report = Report(path.name)
    manifest = check_files(path, report)
    artifact = None
    try:
        known = recognized(path)
        artifact = open_artifact(path) if known or manifest is None else None
        if not known and manifest is not None:
            report.find(f"{path}: found no artifact of a known format, expected {manifest.format}")
    except ModelError as error:
        if manifest is None and not report.findings and not recognizable(path):
            raise
        report.find(*error.message.split("\n"))
    if artifact is not None:
        check_tensors(artifact, manifest, report)
    if source is None:
        report.skip("what it was made from: no --source was given")
    elif manifest is None:
        report.skip("what it was made from: there is no manifest that names it")
    elif artifact is not None:
        from quantkit.verification.lineage import check_source

        check_source(artifact, manifest, source, report, deep=deep)
    return report


def recognizable(path: Path) -> bool:
    """Whether a path is of a known format, however damaged behind what tells the format."""
    from quantkit.formats import recognized

    try:
        return recognized(path) is not None
    except ModelError:
        return False
