"""Results in, reports out: the comparison, its Markdown and its terminal form. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pydantic import ValidationError

from quantkit.bench.measurement import RESULTS_SCHEMA_VERSION, Results
from quantkit.errors import DataError
from quantkit.manifest import write_atomic

if TYPE_CHECKING:
    from rich.console import RenderableType


def rebuild(results: Sequence[Path], out: Path) -> list[Path]:
    """Write report.md and report.json into `out` from result files alone, and return their paths.

    Files of one model, machine and baseline become one comparison, the others a section each. report.json holds the
    comparisons as numbers. Raises DataError when a file is missing or not a results file; nothing is written then.
    """
    from quantkit.report.comparison import compare
    from quantkit.report.markdown import markdown

    comparisons = compare([load(path) for path in results])
    document = {"comparisons": [comparison.model_dump(mode="json") for comparison in comparisons]}
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.md": markdown(comparisons),
        "report.json": json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        write_atomic(out / name, content.encode())
    return [out / name for name in contents]


def load(path: Path) -> Results:
    """Read a results file. Raises DataError naming the file when it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", hint="give the results.json that bench --out or run wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != RESULTS_SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version}; expected {RESULTS_SCHEMA_VERSION}")
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        where = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise DataError("\n".join(where), hint="the file was not written by this version of quantkit") from error


def terminal(*results: Results) -> RenderableType:
    """The comparison of results, for a rich console; `show` prints it with a width that suits pipes too."""
    from quantkit.report.comparison import compare
    from quantkit.report.screen import render

    return render(compare(results))


def show(*results: Results, stream: TextIO | None = None) -> None:
    """Print the comparison of results on `stream`, stdout unless given."""
    from quantkit.report.comparison import compare
    from quantkit.report.screen import show as print_all

    print_all(compare(results), stream)
