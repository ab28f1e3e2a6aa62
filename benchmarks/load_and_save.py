"""Time and memory of whole processes: `quantkit quantize` beside transformers + bitsandbytes loading and saving.

usage: python benchmarks/load_and_save.py MODEL... --out RESULTS.json [--jobs nf4 int8 ...] [--repetitions 3]

Both read the same folder, quantize the same linears and write a folder that transformers loads. Ours also hashes what
it read and wrote. Jobs of one kind alternate, after a run that brings the files into memory. Rows of an earlier
RESULTS.json stay unless they are measured anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantkit.environment import environment

PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
kind, model, out = sys.argv[1:]
if kind == "int8":
    config = BitsAndBytesConfig(load_in_8bit=True)
else:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16,
                                bnb_4bit_use_double_quant=kind == "nf4-double")
AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float16).save_pretrained(out)
"""
"""The shortest way that the peer's documentation gives."""

PEER_JOBS = ("nf4", "nf4-double", "int8")
"""Recipes that the peer has a like of; others are measured alone."""


def run(command: list[str], **where: Any) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak resident bytes of a process. where: what Popen takes, folder or environment.
    Raises CalledProcessError when it fails."""
    with tempfile.TemporaryFile() as messages:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, **where)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            sys.stderr.write(messages.read().decode(errors="replace")[-4000:])
            raise subprocess.CalledProcessError(process.returncode, command)
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024.0}


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


def command(side: str, job: str, model: Path, out: Path) -> list[str]:
    if side == "quantkit":
        settings = ["--set", "method.group_size=64"] if job == "rtn-4bit-g128" else []  # 64 divides every width
        return [sys.executable, "-m", "quantkit", "quantize", job, "--model", str(model), "--out", str(out), *settings]
    return [sys.executable, "-c", PEER, job, str(model), str(out)]


def measure(model: Path, job: str, repetitions: int) -> dict[str, Any]:
    """A row: medians and every run of both sides, and their ratio."""
    sides = ["quantkit", "transformers"] if job in PEER_JOBS else ["quantkit"]
    for path in model.glob("*.safetensors"):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for _ in range(repetitions):
            for side in sides:
                runs[side].append(run(command(side, job, model, out)))
                written[side] = folder_bytes(out)
                shutil.rmtree(out)
    row: dict[str, Any] = {"model": model.name, "model_bytes": folder_bytes(model), "job": job}
    for side in sides:
        medians = {key: statistics.median(one[key] for one in runs[side]) for key in runs[side][0]}
        row[side] = {**medians, "written_bytes": written[side], "runs": runs[side]}
    row["peak_rss_limit_bytes"] = row["model_bytes"] / 4 + 400e6
    if len(sides) == 2:
        row["times_faster"] = row["transformers"]["wall_s"] / row["quantkit"]["wall_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", default=["nf4", "int8", "rtn-4bit-g128", "gguf-q8_0"])
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    kept: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for model in given.models:
        for job in given.jobs:
            row = measure(model, job, given.repetitions)
            kept = [old for old in kept if (old["model"], old["job"]) != (row["model"], row["job"])] + [row]
            shown = " ".join(
                f"{side} {row[side]['wall_s']:.1f} s {row[side]['cpu_s']:.1f} CPU s "
                f"{row[side]['peak_rss_bytes'] / 1e6:.0f} MB"
                for side in ("quantkit", "transformers")
                if side in row
            )
            print(f"{model.name} {job}: {shown} (limit {row['peak_rss_limit_bytes'] / 1e6:.0f} MB)", flush=True)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({"environment": environment(), "rows": kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
