"""What the first run after an installation takes more than the next: whole processes, without compiled loops and with.

usage: python benchmarks/first_run.py MODEL RECIPE... --out RESULTS.json [--tree FOLDER ...]

Each recipe runs twice with one new cache of numba's: the first run compiles, the second finds what it compiled. --tree:
folders whose quantkit is run as well, one beside the other, to compare versions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from load_and_save import run

from quantkit.environment import environment

HERE = Path(__file__).resolve().parents[1]


def measured(tree: Path, recipe: str, model: Path, place: Path) -> dict[str, float]:
    """One process with a cache of its own in a folder."""
    command = [sys.executable, "-m", "quantkit", "quantize", recipe, "--model", str(model), "--out", str(place / "out")]
    variables = {**os.environ, "PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(place / "cache")}
    return run([*command, "--force"], cwd=tree, env=variables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tree", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for recipe in given.recipes:
        for tree in [*given.tree, HERE]:
            with tempfile.TemporaryDirectory() as folder:
                job = (tree.resolve(), recipe, given.model.resolve(), Path(folder))
                first, behind = measured(*job), measured(*job)
            version = "this" if tree == HERE else tree.name
            rows.append({"recipe": recipe, "version": version, "first": first, "next": behind})
            print(f"{recipe} {version}: first {first['wall_s']:.1f} s, next {behind['wall_s']:.1f} s", flush=True)
            given.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
