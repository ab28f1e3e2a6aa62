"""What `quantkit report` does: the table on the terminal, or files, or the JSON document."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantkit import report as reports
from quantkit.errors import UsageError
from quantkit.report.model import Report


def report(
    results: Sequence[Path], *, out: Path | None, price_per_hour: float | None
) -> tuple[dict[str, Any], str | Callable[[], None]]:
    """The report as a document, and what a person is told: the table, or the files that were written into `out`.

    Raises UsageError without a results file, DataError when one is missing or of another kind.
    """
    if not results:
        raise UsageError(
            "report: no results file was named", hint="`quantkit run` and `bench --out` leave results.json"
        )
    comparisons = reports.compared(results, price_per_hour=price_per_hour)
    if out is None:
        from quantkit.report.screen import show

        return reports.document(comparisons), functools.partial(show, comparisons)
    written = reports.write(comparisons, out)
    return reports.document(comparisons), "\n".join(str(path) for path in written)


def schema() -> dict[str, Any]:
    """The JSON schema of report.json and of `report --json`."""
    return Report.model_json_schema(mode="serialization")
