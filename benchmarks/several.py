"""GPTQ, AWQ, NF4 and INT8 in one pass over a model, beside the slowest of them alone: seconds of whole processes.

usage: python benchmarks/several.py MODEL [--runs 3] [--text FILE]

The calibrated two see the unquantized model's inputs, so that they share the pass. Prints JSON, which goes into
benchmarks/results/several.json. The sides take turns after a run of each that compiles its loops and is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from quantkit.environment import environment

RECIPES = {
    "gptq": "{name: gptq, bits: 4, group_size: 64, symmetric: true, propagate: unquantized}",
    "awq": "{name: awq, bits: 4, group_size: 64, propagate: unquantized}",
    "nf4": "{name: nf4}",
    "int8": "{name: int8}",
}

PASS = """
import sys
from pathlib import Path
from quantkit.quiet import quiet_libraries
quiet_libraries()
import torch
from quantkit.jobs import open_model, run_passes
from quantkit.progress import Progress
from quantkit.recipe import load_recipe
model, folder, *names = sys.argv[1:]
source, _ = open_model(model, None, None, names[0])
wanted = [(name, load_recipe(f"{folder}/{name}.yaml"), Path(folder, name)) for name in names]
run_passes(wanted, source, torch.device("cpu"), True, Progress())
"""


def seconds(model: str, folder: Path, names: list[str]) -> float:
    """Of a whole process that makes these artifacts. Raises CalledProcessError when it fails."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", PASS, model, str(folder), *names], check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def measure(model: str, text: Path, runs: int) -> dict[str, Any]:
    sides = {"gptq alone": ["gptq"], "awq alone": ["awq"], "together": list(RECIPES)}
    found: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for recipe, method in RECIPES.items():
            calibration = f"calibration: {{set: {text.resolve()}, sequences: 32, length: 512}}"
            (folder / f"{recipe}.yaml").write_text(f"schema_version: 1\nmethod: {method}\n{calibration}\n")
        for turn in range(runs + 1):
            for side, names in sides.items():
                took = seconds(model, folder, names)
                print(f"{side}: {took:.1f} s{'' if turn else ', not counted'}", file=sys.stderr)
                if turn:
                    found[side].append(round(took, 1))
    slowest = max(median(found["gptq alone"]), median(found["awq alone"]))
    return {
        "environment": environment(),
        "seconds": found,
        "together_beside_the_slowest": round(median(found["together"]) / slowest, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--text", type=Path, default=Path("../shared/data/text/wikitext2/wiki.train.raw"))
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.text, given.runs), indent=2))
