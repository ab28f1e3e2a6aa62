"""Results in, reports out: the comparison for the terminal, as Markdown, HTML, JSON and plots. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import ValidationError

from quantkit.bench.measurement import RESULTS_SCHEMA_VERSION, Results
from quantkit.errors import DataError
from quantkit.manifest import write_atomic
from quantkit.output import check_folder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quantkit.report.model import Comparison


def rebuild(results: Sequence[Path], out: Path, *, price_per_hour: float | None = None) -> list[Path]:
    """Write the report into `out` from result files alone, and return the paths of its files.

    Files of one model, machine and baseline become one comparison, the others a section each. price_per_hour: of the
    machine; tokens then have a cost. Raises DataError when a file is missing or not a results file; nothing is written
    then.
    """
    return write(compared(results, price_per_hour=price_per_hour), out)


def write(comparisons: Sequence[Comparison], out: Path) -> list[Path]:
    """Write report.md, report.html, report.json and plots/ into `out`, and return their paths.

    Plots that an earlier report left and that have nothing to show any more are removed. Raises UsageError when there
    can be no such folder.
    """
    check_folder(out)
    from quantkit.report.html import page
    from quantkit.report.markdown import markdown

    drawn = _plot_files(comparisons)
    contents = {
        "report.md": markdown(comparisons),
        "report.html": page(comparisons),
        "report.json": json.dumps(document(comparisons), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        **drawn,
    }
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for path in (out / "plots").glob("*.svg"):
        if f"plots/{path.name}" not in drawn:
            path.unlink()
    for name, content in contents.items():
        write_atomic(out / name, content.encode())
    return [out / name for name in contents]


def compared(results: Sequence[Path], *, price_per_hour: float | None = None) -> list[Comparison]:
    """The comparisons in result files. Raises DataError when one is missing or not a results file."""
    from quantkit.report.comparison import compare

    return compare([load(path) for path in results], price_per_hour=price_per_hour)


def document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What report.json holds; `quantkit report --schema` describes it."""
    from quantkit.report.model import Report

    return Report(comparisons=tuple(comparisons)).model_dump(mode="json")


def _plot_files(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """{path below the report's folder: SVG} of every plot; several comparisons are numbered."""
    from quantkit.report.heat import bits_map, noise_map
    from quantkit.report.pareto import plots
    from quantkit.report.svg import scatter

    found = {}
    for place, comparison in enumerate(comparisons, 1):
        start = f"plots/{place}-" if len(comparisons) > 1 else "plots/"
        for plot in plots(comparison):
            found[f"{start}{plot.key}.svg"] = scatter(plot, alone=True) + "\n"
        for line in comparison.lines:
            for kind, drawn in (("sqnr", noise_map(line, alone=True)), ("bits", bits_map(line, alone=True))):
                if drawn is not None:
                    found[f"{start}{kind}-{re.sub('[^A-Za-z0-9._-]+', '-', line.label)}.svg"] = drawn + "\n"
    return found


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
