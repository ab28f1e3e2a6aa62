"""Token ids in llama.cpp beside those of the source's own tokenizer, counted over real text.

    python benchmarks/tokenizer_parity.py TEXT... [--models MODEL...] [--out benchmarks/results/tokenizer_parity.json]

TEXT: files, compared line by line; beside them the Python standard library's sources and pydoc's topics, and strings
of characters drawn from many scripts, digits, signs, emoji and white space with a fixed seed. For the small
vocabularies that the tests make in each family's style, and for MODELs (Hugging Face folders). Needs the extra
llama-cpp. Exits with 1 when one line differs. benchmarks/fill_gguf.py puts the counts into docs/gguf.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fakes.vocabularies import BYTE_LEVEL, ROWS, SENTENCEPIECE, general_of, write_style  # noqa: E402
from oracles import llama_cpp  # noqa: E402
from quantkit.formats import gguf_parity  # noqa: E402
from quantkit.formats.gguf_vocabulary import tokenizer_metadata  # noqa: E402
from quantkit.model.reader import open_source  # noqa: E402

SCRIPTS = ((0x20, 0x7E), (0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x660, 0x669))
SCRIPTS += ((0x905, 0x939), (0xE01, 0xE2E), (0x3041, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F600, 0x1F64F))
SPACES = " \t\n  "
MODULES = ("argparse", "ast", "decimal", "inspect", "json/decoder", "pickle", "typing", "turtle")


def drawn(count: int) -> list[str]:
    """Strings of up to 40 characters, runs of one script beside each other."""
    random, made = Random(0), []
    for _ in range(count):
        text = ""
        while len(text) < random.randrange(4, 40):
            first, last = random.choice(SCRIPTS)
            text += "".join(chr(random.randint(first, last)) for _ in range(random.randint(1, 6)))
            text += random.choice(SPACES) * random.choice((0, 1, 1, 2))
        made.append(text.strip())
    return made


def lines_of(texts: list[Path]) -> dict[str, list[str]]:
    """What is compared, by kind; a line as it stands, without the white space around it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [(library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    found = {path.name: path.read_text(encoding="utf-8", errors="replace").splitlines()[:4000] for path in texts}
    found["Python sources"] = "\n".join(code).splitlines()[:8000]
    found["pydoc topics"] = "\n".join(topics.values()).splitlines()[:4000]
    return {kind: [line.strip() for line in lines if line.strip()] for kind, lines in found.items()} | {
        "drawn from 13 scripts": drawn(2000)
    }


def count(folder: Path, rows: int, config: dict[str, Any], general: dict[str, str], texts: dict[str, list[str]]) -> Any:
    """By kind of text: lines and tokens compared, lines that differ."""
    tokenizer, found = Tokenizer.from_file(str(folder / "tokenizer.json")), {}
    with tempfile.TemporaryDirectory() as made:
        gguf_parity.write_keys(Path(made) / "v.gguf", tokenizer_metadata(folder, config, rows, general), general)
        with llama_cpp.Model(Path(made) / "v.gguf", vocab_only=True) as model:
            for kind, lines in texts.items():
                ids = [encoded.ids for encoded in tokenizer.encode_batch(lines)]
                wrong = [line for line, own in zip(lines, ids, strict=True) if model.tokenize(line) != own]
                found[kind] = {"lines": len(lines), "tokens": sum(map(len, ids)), "differ": len(wrong)}
                for line in wrong[:3]:
                    print(f"{folder.name}, {kind}: {line!r}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tokenizer_parity.json")
    given = parser.parse_args()
    texts, results = lines_of(given.texts), {}
    with tempfile.TemporaryDirectory() as made:
        for style in (*BYTE_LEVEL, *SENTENCEPIECE):
            folder = write_style(Path(made) / style, style)
            results[style] = count(folder, ROWS, {}, general_of(style), texts)
            print(style, json.dumps(results[style]), flush=True)
    for path in given.models:
        source = open_source(str(path))
        general = {"general.name": path.name, "general.architecture": "llama"}
        rows = source.shape("model.embed_tokens.weight")[0]
        results[path.name] = count(path, rows, source.config, general, texts)
        print(path.name, json.dumps(results[path.name]), flush=True)
    given.out.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(kind["differ"] for model in results.values() for kind in model.values()))


if __name__ == "__main__":
    sys.exit(main())
