"""Puts the measurements of GGUF files into docs/gguf.md, from benchmarks/results: tokenizer_parity.json,
llama_agreement.json and gguf_types.json.

    python benchmarks/fill_gguf.py            writes
    python benchmarks/fill_gguf.py --check    writes nothing, exits with 1 when the page is out of date

What stands outside the markers is left as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AGREEMENT = """### Does llama.cpp compute what the file holds?

Both take the same token ids. Decoded weights run in transformers in float32; llama.cpp rounds the inputs of every
product with quantized weights to 8 bits. The last column but one is how far the decoded weights move when their
inputs are rounded likewise. Made by `python benchmarks/llama_agreement.py --model MODEL`."""

PARITY = """Counted by `python benchmarks/tokenizer_parity.py`: lines of real text whose ids in llama.cpp are those of
the source's tokenizer, for small vocabularies that the tests make in each family's style, and for real ones."""

TYPES = """## What each type costs

`python benchmarks/gguf_types.py` makes every recipe `gguf-*` and measures it by llama.cpp's logits. (n of m): so many
linears got a larger type because 256 does not divide their rows. MB and bits a weight are those of the whole file;
times are of encoding alone, without reading and writing, beside llama.cpp's `ggml_quantize_chunk` on the same weights
and threads, which is what `llama-quantize` spends its time in; a dash where they have not been measured. Same bytes:
tensors that both encode alike; GPTQ's rounding chooses other codes on purpose."""

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gguf.md"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column set left and the others right."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def types(results: dict[str, Any]) -> str:
    """A table for each model, the largest file first."""
    return "\n\n".join(_model(name, found) for name, found in results["models"].items())


def _model(name: str, found: dict[str, Any]) -> str:
    text, baseline = found["text"], found["baseline"]["perplexity"]["value"]
    headers = ["", "MB", "bits/weight", "perplexity", "KL", "top-1 %", "encode s", "llama.cpp s", "same bytes"]
    rows = [_row(row) for row in sorted(found["recipes"].values(), key=lambda row: -row["bytes"])]
    timed = [row["encode"] for row in found["recipes"].values() if row.get("encode")]
    encoding = f"; encode times with {timed[0]['threads']} threads" if timed else ""
    heading = (
        f"**{name}**, {text['sequences']} x {text['length']} tokens of {text['set']}, baseline's perplexity "
        f"{baseline:.3f}; runs with {found['threads']} threads{encoding}:"
    )
    return f"{heading}\n\n{table(headers, rows)}"


def _row(row: dict[str, Any]) -> list[str]:
    losses = {metric: one["value"] for metric, one in row["losses"].items()}
    mark = f" ({row['fell_back']} of {row['linears']})" if row["fell_back"] else ""
    times = row.get("encode")
    encoded = ["–"] * 3
    if times:
        equal = "all" if times["equal_bytes"] == times["tensors"] else f"{times['equal_bytes']} of {times['tensors']}"
        encoded = [f"{times['quantkit_s']:.2f}", f"{times['llama_cpp_s']:.2f}", equal]
    return [
        f"{row['method'].removeprefix('gguf ')}{mark}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['bits_per_weight_all']:.2f}",
        f"{losses['perplexity']:.3f}",
        f"{losses['kl']:.4f}",
        f"{100 * losses['top1']:.1f}",
        *encoded,
    ]


def parity(results: dict[str, Any]) -> str:
    """A row for each tokenizer: lines that are the same of lines compared, by kind of text, and tokens in all."""
    kinds = list(next(iter(results.values())))
    rows = []
    for name, found in results.items():
        cells = [f"{one['lines'] - one['differ']} of {one['lines']}" for one in found.values()]
        rows.append([name, *cells, f"{sum(one['tokens'] for one in found.values()):,}"])
    return table(["", *kinds, "tokens"], rows)


def agreement(results: dict[str, Any]) -> str:
    columns = ("perplexity, llama.cpp", "decoded", "KL to baseline, llama.cpp", "decoded", "difference")
    headers = ["", *columns, "KL decoded to llama.cpp", "KL decoded to rounded inputs", "same top-1 %"]
    rows = []
    for row in results["files"]:
        llama, decoded = row["llama.cpp"], row["decoded weights"]
        rows.append(
            [
                row["file"],
                f"{llama['perplexity']:.3f}",
                f"{decoded['perplexity']:.3f}",
                f"{llama['kl']:.5f}",
                f"{decoded['kl']:.5f}",
                f"{row['kl_difference']:+.5f} ± {row['kl_difference_error']:.5f}",
                f"{row['kl_between']:.5f}",
                f"{row['kl_of_rounded_inputs']:.5f}",
                f"{100 * row['top1_between']:.2f}",
            ]
        )
    text = results["text"]
    heading = (
        f"{results['model']}, {text['sequences']} x {text['length']} tokens of {text['set']}, baseline's perplexity "
        f"{results['baseline_perplexity']:.3f}:"
    )
    return f"{heading}\n\n{table(headers, rows)}"


def filled(page: str) -> str:
    """The page with every section between its markers, as far as they have been measured."""
    sections = (
        ("parity", PARITY, parity, "tokenizer_parity"),
        ("agreement", AGREEMENT, agreement, "llama_agreement"),
        ("types", TYPES, types, "gguf_types"),
    )
    for marker, introduction, make, file in sections:
        path = RESULTS / f"{file}.json"
        if not path.is_file():
            continue
        begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{PAGE}: no {begin} ... {end}")
        body = f"{introduction}\n\n{make(json.loads(path.read_text()))}"
        page = f"{before}{begin}\n{body}\n{end}{after}"
    return page


def main() -> None:
    page = PAGE.read_text()
    wanted = filled(page)
    if "--check" in sys.argv[1:]:
        sys.exit(page != wanted and f"{PAGE.name} is out of date: python benchmarks/fill_gguf.py")
    PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
