"""What `quantkit plan` says beside what `quantkit quantize` then does: bytes, peak memory, time, for five recipes.

usage: python benchmarks/plan_vs_reality.py MODEL OUT.json [--sequences 32]
       python benchmarks/plan_vs_reality.py MODEL OUT.json --replan    after a change of a constant

docs/fill_readme.py makes the table of docs/plan.md from benchmarks/results/plan.json.

MODEL: a Hugging Face folder; random_llama.py makes one. Results of other models in OUT.json stay. Each run is a whole
process on an otherwise idle machine. Peaks are what the kernel counts for the process (ru_maxrss). Before the first run
of each recipe its kernels are compiled by one that is not counted. At last the time of a plan for a model of 70 billion
parameters, whose headers come from a hub on the loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("int8", "nf4", "awq-4bit-g64", "gptq-4bit-g64", "gguf-q4_k_m")
CALIBRATED = ("awq-4bit-g64", "gptq-4bit-g64", "gptq-4bit-g64-corrected")


def quantkit(*words: str, environment: dict[str, str] | None = None) -> tuple[dict[str, Any], float, float]:
    """A command's JSON document, its seconds and its peak resident bytes. Raises CalledProcessError."""
    command = [sys.executable, "-m", "quantkit", *words, "--json"]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
        out.seek(0)
        return json.load(out), seconds, usage.ru_maxrss * 1024


def words_of(model: Path, recipe: str, sequences: int) -> list[str]:
    """The command line of a recipe, the same for both verbs."""
    words = [recipe, "--model", str(model)]
    return words + (["--set", f"calibration.sequences={sequences}"] if recipe in CALIBRATED else [])


def find(model: Path, recipe: str, sequences: int, folder: Path) -> dict[str, float]:
    """What a run takes and gives, after one that compiles its kernels."""
    words, out = words_of(model, recipe, sequences), folder / recipe
    quick = ["--set", "calibration.sequences=2"] if recipe in CALIBRATED else []
    quantkit("quantize", *words, *quick, "--out", str(out))
    _, seconds, peak = quantkit("quantize", *words, "--out", str(out), "--force")
    facts, _, _ = quantkit("inspect", str(out))
    return {
        "tensor_bytes": sum(tensor["bytes"] for tensor in facts["tensors"]),
        "weight_file_bytes": facts["weight_bytes"],
        "peak_rss_bytes": peak,
        "seconds": seconds,
    }


def compare(model: Path, recipe: str, sequences: int, found: dict[str, float]) -> dict[str, Any]:
    """One recipe: what is planned beside what was found, and the ratio."""
    planned, _, _ = quantkit("plan", *words_of(model, recipe, sequences))
    forecast = {
        "tensor_bytes": planned["artifact"]["tensor_bytes"],
        "weight_file_bytes": planned["artifact"]["weight_file_bytes"],
        "peak_rss_bytes": planned["memory"]["peak_rss_bytes"],
        "seconds": planned["time"]["seconds"],
    }
    return {
        "model": model.name,
        "recipe": recipe,
        "method": planned["method"],
        "sequences": sequences,
        "planned": forecast,
        "found": found,
        "ratio": {key: round(forecast[key] / found[key], 4) for key in found},
        "parts_bytes": planned["memory"]["parts_bytes"],
        "parts_s": planned["time"]["parts_s"],
    }


def from_hub(folder: Path) -> dict[str, Any]:
    """Seconds of a whole plan for 141 GB of headers on the loopback: three runs, with what was sent."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fakes.hub import FakeHub
    from fakes.large_model import large_model

    seconds = []
    with FakeHub({"acme/large": large_model()}) as hub:
        for run in range(3):
            offered = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / f"home-{run}")}
            environment = {key: value for key, value in os.environ.items() if "PROXY" not in key.upper()} | offered
            before = hub.sent_bytes
            document, took, _ = quantkit("plan", "gptq-4bit-g128", "--model", "acme/large", environment=environment)
            seconds.append(round(took, 2))
        sent = hub.sent_bytes - before
    return {"weight_bytes": document["model"]["weight_bytes"], "sent_bytes": sent, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--replan", action="store_true")
    given = parser.parse_args()
    results = json.loads(given.results.read_text()) if given.results.exists() else {"rows": []}
    rows = {(row["model"], row["recipe"]): row for row in results["rows"]}
    with tempfile.TemporaryDirectory() as made:
        if not given.replan:
            quantkit("plan", "int8", "--model", str(given.model), "--probe-again")
        results["hub"] = from_hub(Path(made))
        for recipe in given.recipes:
            key = (given.model.name, recipe)
            sequences = rows[key]["sequences"] if given.replan else given.sequences
            found = rows[key]["found"] if given.replan else find(given.model, recipe, sequences, Path(made))
            rows[key] = compare(given.model, recipe, sequences, found)
            print(*key, rows[key]["ratio"], flush=True)
            given.results.write_text(json.dumps({**results, "rows": list(rows.values())}, indent=2) + "\n")


if __name__ == "__main__":
    main()
