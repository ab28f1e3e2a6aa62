"""A checkpoint to GGUF: `quantkit quantize` beside llama.cpp's way, a 16-bit file that is then quantized.

usage: python benchmarks/convert.py MODEL... --out RESULTS.json [--types q4_k_m q8_0 q4_0] [--repetitions 3]

MODEL is a Hugging Face folder (random_llama.py makes one). llama.cpp's two steps are stood in for, since the prebuilt
binding has neither its script nor llama_model_quantize:

- conversion by quantkit's own to BF16, which checks the tokenizer and hashes both files besides;
- quantizing by llama.cpp's own encoder and converter, ggml_quantize_chunk and ggml_bf16_to_fp32_row, over a mapped file
  with a thread for each core, as llama_model_quantize does: the types and the header are those of quantkit's file, and
  the result has to equal it byte for byte.

Every figure is of a whole process; sides alternate, after a run that brings the files into memory. Peaks are what the
kernel counts (ru_maxrss); that of quantizing includes the mapped file. Needs the xllamacpp wheel (the extra llama-cpp).
Rows of an earlier RESULTS.json stay unless they are measured anew.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from load_and_save import folder_bytes, run

from quantkit.environment import environment
from quantkit.model.reader import open_source

QUANTIZE = """
import ctypes, importlib.util, os, pathlib, sys, threading
import gguf, numpy as np
source, like, out = sys.argv[1:]
folder = pathlib.Path(importlib.util.find_spec("xllamacpp").origin).parent
lib = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
pointer, i64 = ctypes.c_void_p, ctypes.c_int64
lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
lib.ggml_quantize_chunk.restype = ctypes.c_size_t
lib.ggml_bf16_to_fp32_row.argtypes = [pointer, pointer, i64]
given, wanted = gguf.GGUFReader(source), gguf.GGUFReader(like)
plan = {tensor.name: tensor for tensor in wanted.tensors}
threads = os.cpu_count()
values = coded = np.empty(0, np.uint8)
with open(like, "rb") as head, open(out, "wb") as file:
    file.write(head.read(wanted.data_offset))
    for tensor in given.tensors:
        to = plan[tensor.name]
        file.seek(int(to.data_offset))
        if to.tensor_type == tensor.tensor_type:
            file.write(tensor.data.data)
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        columns, rows = (int(size) for size in tensor.shape)
        row_bytes = int(to.n_bytes) // rows
        values = values if values.size >= 4 * rows * columns else np.empty(4 * rows * columns, np.uint8)
        coded = coded if coded.size >= to.n_bytes else np.empty(int(to.n_bytes), np.uint8)
        at, into, made = tensor.data.ctypes.data, values.ctypes.data, coded.ctypes.data
        def work(first, end):
            lib.ggml_bf16_to_fp32_row(at + 2 * first * columns, into + 4 * first * columns, (end - first) * columns)
            lib.ggml_quantize_chunk(int(to.tensor_type), into, made, first * columns, end - first, columns, None)
        share = -(-rows // threads)
        parts = [threading.Thread(target=work, args=(k, min(k + share, rows))) for k in range(0, rows, share)]
        for part in parts: part.start()
        for part in parts: part.join()
        file.write(coded[: int(to.n_bytes)].data)
    file.truncate(os.path.getsize(like))
    file.flush()
    os.fsync(file.fileno())
"""


def command(model: Path, out: Path, type_name: str) -> list[str]:
    """`quantkit quantize` of one type; a float type is that of the embedding too."""
    settings = [f"method.type={type_name}"]
    if type_name == "bf16":
        settings += ["method.embedding_type=bf16", "model.dtype=bfloat16"]
    named = [word for setting in settings for word in ("--set", setting)]
    start = [sys.executable, "-m", "quantkit", "quantize", "gguf-q8_0", "--model", str(model)]
    return [*start, "--out", str(out), "--force", *named]


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def measure(model: Path, type_name: str, repetitions: int, folder: Path) -> dict[str, Any]:
    """A row: medians and every run of the three steps, and how many times faster quantkit is than the other two."""
    whole, half, peer = folder / "bf16", folder / type_name, folder / "peer.gguf"
    runs: dict[str, list[dict[str, float]]] = {"quantkit": [], "convert": [], "quantize": []}
    run(command(model, half, type_name))
    for _ in range(repetitions):
        runs["quantkit"].append(run(command(model, half, type_name)))
        runs["convert"].append(run(command(model, whole, "bf16")))
        quantize = [sys.executable, "-c", QUANTIZE, str(the_file(whole)), str(the_file(half)), str(peer)]
        runs["quantize"].append(run(quantize))
    source = open_source(str(model))
    sizes = {name: source.dtype(name).itemsize for name in source.names()}
    for name in sizes:
        for size in source.shape(name):
            sizes[name] *= size
    row: dict[str, Any] = {
        "model": model.name,
        "model_bytes": folder_bytes(model),
        "largest_tensor_bytes": max(sizes.values()),
        "type": type_name,
        "written_bytes": folder_bytes(half),
        "equal_bytes": filecmp.cmp(the_file(half), peer, shallow=False),
    }
    for side, measured in runs.items():
        medians = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        row[side] = {**medians, "runs": measured}
    row["times_faster"] = (row["convert"]["wall_s"] + row["quantize"]["wall_s"]) / row["quantkit"]["wall_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q8_0", "q4_0"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder for what is written; the system's default otherwise")
    given = parser.parse_args()
    kept: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for model in given.models:
        for type_name in given.types:
            with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
                row = measure(model, type_name, given.repetitions, Path(folder))
            kept = [old for old in kept if (old["model"], old["type"]) != (row["model"], row["type"])] + [row]
            shown = "  ".join(
                f"{side} {row[side]['wall_s']:.1f} s {row[side]['cpu_s']:.1f} CPU s "
                f"{row[side]['peak_rss_bytes'] / 1e6:.0f} MB"
                for side in ("quantkit", "convert", "quantize")
            )
            print(f"{model.name} {type_name}: {shown}  {row['times_faster']:.2f}x", flush=True)
            print(f"equal bytes: {row['equal_bytes']}", flush=True)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({"environment": environment(), "rows": kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
