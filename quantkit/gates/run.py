"""What the verb `gate` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.errors import UsageError
from quantkit.gates.judge import judge
from quantkit.gates.outcome import GateOutcome
from quantkit.gates.outputs import append_summary, summary_path, write_junit
from quantkit.output import check_file
from quantkit.sections import GateSection


def gate(results: Path, bars: Mapping[str, Any], *, junit: Path | None, github_summary: bool) -> list[GateOutcome]:
    """Judge a results file, and leave the outcomes where they are asked for.

    bars: keys of a GateSection. Without a bar the outcomes are those that `run` left in the file. Raises UsageError for
    a bar that is none, when there are none, or when `junit` cannot be written, DataError for what is no results file.
    """
    from quantkit.report import load

    if junit is not None:
        check_file(junit, force=True)
    try:
        section = GateSection.model_validate(bars)
    except ValidationError as error:
        lines = [f"--{str(one['loc'][0]).replace('_', '-')}: {one['msg']}" for one in error.errors()]
        raise UsageError("\n".join(lines)) from error
    found = load(results)
    summary = summary_path() if github_summary else None
    outcomes = judge(found, [section]) if section.bars() else found.gates
    if not outcomes:
        raise UsageError(
            f"{results}: no gate: neither a bar on the command line nor `gates:` in the suite that made it",
            hint="such as --max-kl 0.05",
        )
    if junit is not None:
        write_junit(junit, found.name, outcomes)
    if summary is not None:
        append_summary(summary, found.name, outcomes)
    return outcomes
