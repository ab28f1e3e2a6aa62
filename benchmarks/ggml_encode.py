"""Encoding a matrix in each of ggml's types: quantkit's loops beside ggml_quantize_chunk, which runs on one thread.

    python benchmarks/ggml_encode.py [--rows 4096] [--columns 4096] [--repetitions 3] [--json FILE]

Needs the xllamacpp wheel (the extra llama-cpp). Times are the least of the repetitions; the bytes of both are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numba
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from oracles import llama_cpp  # noqa: E402
from quantkit.maths.ggml import SEARCHED, WEIGHTED, encode, type_size  # noqa: E402


def least_seconds(work: Callable[[], Any], repetitions: int) -> float:
    """The shortest of several runs, in seconds."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(type_name: str, weight: torch.Tensor, importance: torch.Tensor | None, repetitions: int) -> dict[str, Any]:
    """One row of the table: seconds of both, and whether the bytes agree."""
    number, row_bytes = int(gguf.GGMLQuantizationType[type_name]), type_size(type_name, weight.shape[1])
    weights = None if importance is None else importance.numpy()

    def theirs() -> Any:
        return llama_cpp.quantize(weight.numpy(), number, row_bytes, weights)

    def ours() -> Any:
        return encode(weight, type_name, importance).numpy()

    equal = bool((ours() == theirs()).all())  # and compiles
    seconds: dict[str, float] = {"ggml_1": least_seconds(theirs, repetitions)}
    for threads in dict.fromkeys((1, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(threads)
        torch.set_num_threads(threads)
        seconds[f"quantkit_{threads}"] = least_seconds(ours, repetitions)
    return {"type": type_name, "importance": importance is not None, "equal_bytes": equal, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    drawn = torch.randn(options.columns, generator=generator) ** 2
    cases = [(name, None) for name in ("Q8_0", *WEIGHTED, *SEARCHED)] + [(name, drawn) for name in WEIGHTED + SEARCHED]
    rows = []
    for type_name, importance in cases:
        row = measure(type_name, weight, importance, options.repetitions)
        rows.append(row)
        times = "  ".join(f"{name} {seconds:7.3f} s" for name, seconds in row["seconds"].items())
        kind = "importance" if row["importance"] else "plain"
        faster = row["seconds"]["ggml_1"] / row["seconds"]["quantkit_1"]
        print(
            f"{type_name:7} {kind:10}  {times}  {faster:5.1f}x a thread  equal bytes: {row['equal_bytes']}", flush=True
        )
    if options.json:
        result = {"rows": options.rows, "columns": options.columns, "types": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
