"""Whether a second run of a table lies within the first one's intervals: every cell of one against the other.

usage: python benchmarks/repeat.py FIRST/results.json SECOND/results.json [--out benchmarks/results/repeat.json]

    make report REPORTS=/tmp/again
    python benchmarks/repeat.py reports/table-smollm2/results.json /tmp/again/table-smollm2/results.json

Intervals are those that gates and the report go by (quantkit/report/certainty.py). Prints a line per column: cells that
lie within, cells that have an interval, and the largest ratio between the runs. Bytes and quality come from the same
seeds, so a cell of theirs that lies outside is a fault, and the exit code is 1. Speeds and resident memory have 95%
intervals for another run: one in twenty lies outside by right, and more than one in ten is a fault too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from quantkit.report import load
from quantkit.report.certainty import EXACT, interval
from quantkit.report.comparison import compare
from quantkit.report.model import Cell, Comparison

LEAST_WITHIN = 0.9
"""Share of speeds and peaks that has to lie within: 95% by the intervals' meaning, and numbers of one process lean on
each other."""


def comparison(path: Path) -> Comparison:
    """The one comparison of a results file."""
    (found,) = compare([load(path)])
    return found


def judged(key: str, first: Cell, second: Cell) -> dict[str, Any] | None:
    """Whether the second run's value lies within the first's interval; None where one of the runs has no number."""
    if first.value is None or second.value is None:
        return None
    found = interval(key, first)
    return {
        "first": first.value,
        "interval": found,
        "second": second.value,
        "within": None if found is None else found[0] <= second.value <= found[1],
        "ratio": second.value / first.value if first.value else None,
    }


def columns(first: Comparison, second: Comparison) -> dict[str, dict[str, Any]]:
    """By column's key: its group and the judged cells by label. Raises SystemExit where the tables differ in shape."""
    others = {line.label: line for line in second.lines}
    if others.keys() != {line.label for line in first.lines}:
        raise SystemExit(f"the rows differ: {[line.label for line in first.lines]} and {list(others)}")
    found = {}
    for column in first.columns:
        cells = {}
        for line in first.lines:
            one, other = line.cells.get(column.key), others[line.label].cells.get(column.key)
            if one is None or other is None:
                continue
            verdict = judged(column.key, one, other)
            if verdict is not None:
                cells[line.label] = verdict
        if cells:
            found[column.key] = {"title": column.title, "group": column.group, "cells": cells}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path, help="results of other tables in it stay")
    given = parser.parse_args()
    table = comparison(given.first)
    found = columns(table, comparison(given.second))
    faults = 0
    machine: list[bool] = []
    for key, column in found.items():
        cells = list(column["cells"].values())
        sure = [cell["within"] for cell in cells if cell["within"] is not None]
        apart = max((max(cell["ratio"], 1 / cell["ratio"]) for cell in cells if cell["ratio"]), default=1.0)
        print(f"{key:24} {column['group']:8} {sum(sure):2} of {len(sure):2} within; at most {apart:.3f} times apart")
        if key in EXACT or column["group"] == "quality":
            faults += len(sure) - sum(sure)
        else:
            machine += sure
    print(f"speeds and memory: {sum(machine)} of {len(machine)} within")
    if given.out:
        results = json.loads(given.out.read_text()) if given.out.exists() else {}
        results[table.name + ", " + table.model] = found
        given.out.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if faults or sum(machine) < LEAST_WITHIN * len(machine) else 0


if __name__ == "__main__":
    sys.exit(main())
