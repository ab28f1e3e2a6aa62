"""Damaged recipes, safetensors headers, GGUF headers and JSON files through what reads them; prints the counts.

usage: python benchmarks/fuzz.py FOLDER [--count 1000] [--seed 1] [--kinds recipe,safetensors,gguf,json] [--show 20]

FOLDER holds the whole models that are damaged, made when they are not there. Every case has 5 s of processor time and
200 MB of memory. Prints JSON; exits with 1 when a case failed, with a line for each kind of failure on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fakes.fuzzing import FAILURES, KINDS, Result, run  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--show", type=int, default=20)
    given = parser.parse_args()
    counts, failed = {}, []
    for kind in given.kinds.split(","):
        started = time.perf_counter()
        results = list(run(given.folder, kind, given.seed, given.count))
        failures = [result for result in results if result.outcome in FAILURES]
        _show(failures, given.show)
        failed += failures
        counts[kind] = {
            "cases": len(results),
            **dict(sorted(Counter(result.outcome for result in results).items())),
            "peak_mb": round(max(result.peak_bytes for result in results) / 1e6, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }
    print(json.dumps({"seed": given.seed, "kinds": counts}, indent=2))
    return bool(failed)


def _show(failures: list[Result], most: int) -> None:
    """Failures of one place and kind share a line."""
    places: dict[str, list[Result]] = {}
    for result in failures:
        kind, _, where = result.detail.rpartition(" | ")
        places.setdefault(f"{result.outcome}: {kind.split(':')[0]} {where.split(' < ')[0]}", []).append(result)
    for place, same in sorted(places.items(), key=lambda item: -len(item[1]))[:most]:
        print(f"{len(same):4} {same[0].kind} {place}; case {same[0].index}: {same[0].detail[:300]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
