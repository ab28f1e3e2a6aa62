"""The steps of GPTQ's default, taken away one at a time: KL divergence and time of each, into docs/quality.md.

python benchmarks/ablation.py MODEL            runs benchmarks/compare_gptq.yaml in every variant, writes
                                               benchmarks/results/quality/ablation.json and the page
python benchmarks/ablation.py                  only writes the page from the results that are there
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "compare_gptq.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "quality" / "ablation.json"
PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- ablation -->", "<!-- /ablation -->"
VARIANTS: dict[str, dict[str, Any]] = {
    "the default": {},
    "without AWQ's scales": {"method": {"exponents": 0}},
    "without the range search": {"method": {"search_range": False}},
    "without the descent": {"method": {"refine": 0}},
    "inputs of the unquantized model": {"method": {"propagate": "unquantized"}},
    "the paper's GPTQ": {"method": {"exponents": 0, "search_range": False, "refine": 0}},
}


def run(model: str) -> None:
    """Quantize and judge every variant in one comparison."""
    base = yaml.safe_load(RECIPE.read_text())
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, changes in enumerate(VARIANTS.values()):
            recipe = {
                key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value
                for key, value in base.items()
            }
            files.append(Path(folder) / f"variant-{number}.yaml")
            files[-1].write_text(yaml.safe_dump(recipe))
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "quantkit",
            "compare",
            *map(str, files),
            "--engines",
            "quantkit",
            "--model",
            model,
        ]
        subprocess.run([*command, "--out", str(RESULTS), "--force"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def table() -> str:
    """The rows as Markdown."""
    results = json.loads(RESULTS.read_text())
    lines = ["| variant | KL nats | quantize s |", "| --- | ---: | ---: |"]
    for label, row in zip(VARIANTS, results["rows"], strict=True):
        kl = row["kl"]
        lines.append(f"| {label} | {kl['value']:.4f} ±{kl['error']:.4f} | {row['runs'][0]['quantize_s']:.1f} |")
    machine = results["environment"]
    lead = (
        f"Regauged, symmetric, one run each on {machine['cpu']}, {machine['threads']} threads; ± is one standard error."
    )
    return "\n".join([lead, "", *lines])


if __name__ == "__main__":
    if sys.argv[1:]:
        run(sys.argv[1])
    before, found, rest = PAGE.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{PAGE}: no {BEGIN} ... {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
