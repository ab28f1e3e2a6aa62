"""Outcomes for people and for CI systems: a table, Markdown for a GitHub step, JUnit XML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from quantkit.errors import UsageError
from quantkit.gates.judge import BARS, at, measured
from quantkit.gates.outcome import GateOutcome
from quantkit.manifest import write_atomic
from quantkit.report.layout import Document, Listing, TextTable

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def document(name: str, outcomes: Sequence[GateOutcome]) -> Document:
    """A table of all gates, and why some of them failed or warn."""
    headers = ["", "gate", "measured", "bar", "result"]
    rows = [[it.row, BARS[it.bar].title, measured(it), at(it), it.verdict] for it in outcomes]
    parts: list[TextTable | Listing] = [TextTable("Gates", headers, rows, frozenset(range(len(headers))))]
    for verdict, title in (("failed", "Failed"), ("warned", "Warnings")):
        items = [it.sentence for it in outcomes if it.verdict == verdict]
        parts += [Listing(title, items)] if items else []
    return Document(name, [], parts)


def show(name: str, outcomes: Sequence[GateOutcome]) -> None:
    """Print the table on stdout; what failed or warns is said on stderr."""
    from quantkit.report.screen import show_documents

    whole = document(name, outcomes)
    show_documents([replace(whole, parts=whole.parts[:1])])


def summary_path() -> Path:
    """Where a step of a GitHub workflow leaves its summary. Raises UsageError outside of one."""
    path = os.environ.get(SUMMARY_VARIABLE)
    if not path:
        raise UsageError(f"--github-summary: {SUMMARY_VARIABLE} is not set", hint="a step of a GitHub workflow has it")
    return Path(path)


def append_summary(path: Path, name: str, outcomes: Sequence[GateOutcome]) -> None:
    """Put the table behind what earlier steps said."""
    from quantkit.report.markdown import document_markdown

    with path.open("a", encoding="utf-8") as stream:
        stream.write(document_markdown(document(name, outcomes)) + "\n")


def write_junit(path: Path, name: str, outcomes: Sequence[GateOutcome]) -> None:
    """One test case for each gate: a figure that was not measured is an error, a warning is a pass that says why."""
    failed = [it for it in outcomes if it.verdict == "failed"]
    errors = sum(it.value is None for it in failed)
    counts = {"tests": str(len(outcomes)), "failures": str(len(failed) - errors), "errors": str(errors)}
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"quantkit gates: {name}", **counts})
    for it in outcomes:
        title = f"{BARS[it.bar].title} {at(it)}"
        case = ElementTree.SubElement(suite, "testcase", {"classname": it.row, "name": title})
        if it.verdict == "failed":
            kind = "error" if it.value is None else "failure"
            ElementTree.SubElement(case, kind, {"message": it.sentence})
        elif it.verdict == "warned":
            ElementTree.SubElement(case, "system-out").text = f"warning: {it.sentence}"
    ElementTree.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
