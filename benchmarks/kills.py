"""The kill table: runs that are killed (SIGKILL) at random instants and gone on with, by what they make.

usage: python benchmarks/kills.py [--count 100] [--seed 0] [--out benchmarks/results/kills.json]

A random Llama of six blocks in a temporary folder; every run writes down each block, and is killed at a random instant
between two lines of its journal, one in three again while it goes on. `same`: the files in the end are those of a run
that nobody disturbed, byte for byte, the manifest apart from times and peak memory. Takes about four seconds a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills = _kills(Path(folder), given.count, given.seed)
    rows = []
    for command in dict.fromkeys(kill["command"] for kill in kills):
        those = [kill for kill in kills if kill["command"] == command]
        rows.append(
            {
                "command": command,
                "kills": len(those),
                "same": sum(kill["same"] for kill in those),
                "blocks_kept_median": median(kill["kept"] for kill in those),
                "blocks_kept_most": max(kill["kept"] for kill in those),
            }
        )
    given.out.write_text(json.dumps({"seed": given.seed, "rows": rows, "kills": kills}, indent=1) + "\n")
    print("| command | kills | same bytes in the end | blocks kept, median | most |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    same = sum(kill["same"] for kill in kills)
    print(f"| all | {len(kills)} | {same} | | |")
    sys.exit(0 if same == len(kills) else 1)


def _kills(folder: Path, count: int, seed: int) -> list[dict[str, object]]:
    model = "from pathlib import Path; from conftest import write_tiny_llama as w; import sys;"
    model += "w(Path(sys.argv[1]), num_hidden_layers=6)"
    settings = {**os.environ, "PYTHONPATH": str(TESTS), "QUANTKIT_CACHE": str(folder / "cache")}
    subprocess.run([sys.executable, "-c", model, str(folder / "model")], check=True, env=settings)
    arguments = [sys.executable, str(TESTS / "fakes" / "kills.py"), str(folder / "model"), str(folder / "runs")]
    kills = []
    with subprocess.Popen([*arguments, str(count), str(seed)], stdout=subprocess.PIPE, text=True, env=settings) as run:
        assert run.stdout is not None
        for line in run.stdout:
            kills.append(json.loads(line))
            print(f"{len(kills)} of {count}", end="\r", file=sys.stderr, flush=True)
    if run.returncode:
        sys.exit("a run failed that nobody disturbed: see above")
    return kills


if __name__ == "__main__":
    main()
