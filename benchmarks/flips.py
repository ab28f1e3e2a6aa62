"""Flips single bits at random places of every file of artifacts, one at a time, and counts what `verify` finds.

usage: python benchmarks/flips.py ARTIFACT... [--flips 20] [--seed 0] [--source MODEL]

Each bit is put back. Every file gets as many flips as asked for. Prints JSON: for each artifact the flips and the
ones found, and the seconds of verifying it whole, with --source also of the deep check.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from quantkit.quiet import quiet_libraries
from quantkit.verification import verify


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--flips", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source")
    given = parser.parse_args()
    quiet_libraries()
    results = {path.name: _measure(path, given.flips, given.seed, given.source) for path in given.artifacts}
    print(json.dumps(results, indent=2))
    return any(row["found"] < row["flips"] or not row["passed"] for row in results.values())


def _measure(folder: Path, flips: int, seed: int, source: str | None) -> dict[str, Any]:
    started = time.perf_counter()
    report = verify(folder)
    row: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "verify_s": round(time.perf_counter() - started, 2),
    }
    if source is not None:
        started = time.perf_counter()
        report = verify(folder, source=source, deep=True)
        row["deep_s"] = round(time.perf_counter() - started, 2)
        row["not_checked"] = report.skipped
    row |= {"passed": report.passed, "flips": 0, "found": 0}
    random = Random(f"{seed} {folder.name}")
    for path in sorted(folder.iterdir()):
        for _ in range(flips):
            place, bit = random.randrange(path.stat().st_size), 1 << random.randrange(8)
            _flip(path, place, bit)
            try:
                report = verify(folder)
            finally:
                _flip(path, place, bit)
            row["flips"] += 1
            row["found"] += any(path.name in line for line in report.findings)
    return row


def _flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bit]))


if __name__ == "__main__":
    sys.exit(main())
