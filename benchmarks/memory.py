"""How much memory quantizing takes: over the depth of a model, and for a checkpoint larger than what it may take.

usage: python benchmarks/memory.py depth FOLDER        12 and 48 layers, 512 columns, 32 x 512 tokens
       python benchmarks/memory.py width FOLDER        4 layers, 2048 columns, 4 x 256 tokens
       python benchmarks/memory.py model MODEL         four recipes on a model's folder, 32 x 512 tokens
       python benchmarks/memory.py larger FOLDER       6 GB of weights under --max-memory 3GB, held to it by a cgroup;
                                                       --layers 32 --limit 2GB is half as long

Checkpoints of random weights (random_llama.py) are made in FOLDER when they are not there. Prints JSON, which goes into
benchmarks/results as memory_depth.json, memory_width.json, memory_model.json or memory_larger.json. Peaks are what the
kernel counts for a process (ru_maxrss); the bare import is a process that imports all that the run imports, builds the
model without weights and ends. `bound_mb` is 1.3 times the largest block in float32, its Gram matrices and the hidden
states.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from quantkit.memory import parse_bytes

HERE = Path(__file__).resolve().parent
RECIPE = "gptq-4bit-g64"
PLAIN = "gptq-4bit-g64-plain"  # takes the same memory in less time
BARE = """
import sys, torch
import quantkit.cli, quantkit.pipeline, quantkit.jobs, quantkit.maths.kernels
from quantkit.device import arithmetic
from quantkit.maths.compiled import ready_loops
from quantkit.model.forward import BlockRunner
from quantkit.model.reader import open_source
cpu = torch.device("cpu")
BlockRunner(open_source(sys.argv[1]), cpu, arithmetic(cpu, torch.float32))
ready_loops()  # whatever the arithmetic is
"""


def peak(command: list[str]) -> tuple[float, float]:
    """Peak resident MB and seconds of a whole process. Raises CalledProcessError when it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)  # stdout is the JSON's
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return usage.ru_maxrss * 1024 / 1e6, time.perf_counter() - started


def checkpoint(folder: Path, layers: int, hidden: int, inner: int) -> Path:
    """A model of random weights, made when it is not there."""
    model = folder / f"llama-{layers}x{hidden}x{inner}"
    if not model.exists():
        sizes = ["--layers", str(layers), "--hidden", str(hidden), "--inner", str(inner)]
        subprocess.run([sys.executable, str(HERE / "random_llama.py"), str(model), *sizes], check=True)
    return model


def quantize(
    model: Path, out: Path, sequences: int, length: int, *options: str, recipe: str = RECIPE
) -> tuple[float, float]:
    """Peak MB and seconds of `quantkit quantize`."""
    settings = ["--set", f"calibration.sequences={sequences}", "--set", f"calibration.length={length}"]
    command = [sys.executable, "-m", "quantkit", "quantize", recipe, "--model", str(model), "--out", str(out)]
    return peak([*command, "--force", *settings, *options])


def bound_mb(model: Path, tokens: int) -> float:
    """1.3 times the largest block in float32, its Gram matrices and the hidden states, in MB."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block = 2 * hidden * hidden + 2 * keys * hidden + 3 * inner * hidden
    grams = 3 * hidden * hidden + inner * inner
    return 1.3 * 4 * (block + grams + tokens * hidden) / 1e6


def measured(
    model: Path, out: Path, shape: tuple[int, int], runs: int, *given: str, limited: bool, recipe: str = RECIPE
) -> dict[str, Any]:
    """Peaks of so many runs on `shape` (sequences, their length), their median beside the bare import and the bound.

    given: options of the command line. limited: under a --max-memory of these two together."""
    config = json.loads((model / "config.json").read_text())
    bare, _ = peak([sys.executable, "-c", BARE, str(model)])
    bound = bound_mb(model, shape[0] * shape[1])
    options = ["--max-memory", f"{int(bare + bound)}MB"] if limited else []
    found = [quantize(model, out, *shape, *given, *options, recipe=recipe) for _ in range(runs)]
    tops = [top for top, _ in found]
    row = {
        "recipe": recipe,
        "layers": config["num_hidden_layers"],
        "columns": config["hidden_size"],
        "options": " ".join([*given, *options]),
        "bare_mb": round(bare, 1),
        "peak_mb": round(median(tops), 1),
        "peaks_mb": [round(each, 1) for each in sorted(tops)],
        "above_mb": round(median(tops) - bare, 1),
        "bound_mb": round(bound, 1),
        "seconds": round(median(seconds for _, seconds in found), 1),
    }
    print(row, file=sys.stderr)
    return row


def depth(folder: Path, runs: int) -> dict[str, Any]:
    """Peaks at 12 and 48 layers: rows waiting in memory (the default), and in a file under a limit of the bound."""
    rows = []
    for layers in (12, 48):
        model = checkpoint(folder, layers, 512, 1536)
        rows += [measured(model, folder / "out", (32, 512), runs, limited=limited) for limited in (False, True)]
    return {"recipe": RECIPE, "tokens": 32 * 512, "rows": rows}


def width(folder: Path, runs: int) -> dict[str, Any]:
    """The same at the width of models of a billion weights, with little text: it is the block that counts."""
    model = checkpoint(folder, 4, 2048, 5632)
    rows = [measured(model, folder / "out", (4, 256), runs, limited=limited) for limited in (False, True)]
    return {"recipe": RECIPE, "tokens": 4 * 256, "rows": rows}


def of_model(model: Path, runs: int) -> dict[str, Any]:
    """GPTQ on quantized inputs and in one pass, AWQ with GPTQ's rounding and with its own, with a limit and without."""
    one_pass = ("--set", "method.propagate=unquantized", "--set", "method.refine=0")
    jobs = [("gptq-4bit-g64", ()), ("gptq-4bit-g64", one_pass), ("awq-4bit-g64", ()), ("awq-4bit-g64-nearest", ())]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        rows = [
            measured(model, out, (32, 512), runs, *settings, limited=limited, recipe=recipe)
            for recipe, settings in jobs
            for limited in (False, True)
        ]
    return {"model": model.name, "tokens": 32 * 512, "rows": rows}


@contextmanager
def held_to(limit: int) -> Any:
    """Put this process and its children into a memory cgroup (version 1 or 2; needs root), as containers do."""
    root = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else Path("/sys/fs/cgroup")
    names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
    one, group = root.name == "memory", root / "quantkit-benchmark"
    group.mkdir(exist_ok=True)
    (group / (names[0] if one else "memory.max")).write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield group / (names[1] if one else "memory.peak")
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def larger(folder: Path, layers: int, limit_text: str) -> dict[str, Any]:
    """A checkpoint quantized by a process that gets less memory than it has bytes, page cache included."""
    model = checkpoint(folder, layers, 2048, 5632)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    limit = parse_bytes(limit_text)
    with held_to(limit):
        top, seconds = quantize(model, folder / "out", 4, 256, "--max-memory", limit_text, recipe=PLAIN)
    return {
        "recipe": PLAIN,
        "checkpoint_mb": round(size / 1e6),
        "limit_mb": limit // 10**6,
        "tokens": 4 * 256,
        "peak_mb": round(top),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("depth", "width", "model", "larger"))
    parser.add_argument("folder", type=Path, help="of checkpoints, or a model's")
    parser.add_argument("--layers", type=int, default=66, help="of the checkpoint for larger, 92 MB each")
    parser.add_argument("--runs", type=int, default=3, help="of each row, with and without a limit")
    parser.add_argument("--limit", default="3GB", help="of the memory for larger")
    given = parser.parse_args()
    place: Path = given.folder.resolve()
    if given.what == "larger":
        found = larger(place, given.layers, given.limit)
    elif given.what == "model":
        found = of_model(place, given.runs)
    else:
        found = (depth if given.what == "depth" else width)(place, given.runs)
    print(json.dumps(found, indent=2))
