"""What is lost when only the likeliest tokens of the baseline's predictions are kept: KL and total variation beside
those over the whole vocabulary.

usage: python benchmarks/kept_predictions.py MODEL ARTIFACT TEXT [--sequences 8] [--length 256]

Prints JSON: for each number of tokens kept the mean KL and total variation, and what they are below the whole ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from quantkit.bench import predictions
from quantkit.engines import DECODED
from quantkit.model.calibration import load_calibration
from quantkit.model.load import load_transformers
from quantkit.model.reader import open_source
from quantkit.sections import CalibrationSection

KEPT = (64, 256, 1024, 4096, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("text")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    source = open_source(given.model)
    section = CalibrationSection(set=given.text, sequences=given.sequences, length=given.length)
    ids = load_calibration(section, source.tokenizer_folder(), "evaluation").ids
    baseline = load_transformers(source, torch.float32).eval()
    artifact = DECODED.load(given.artifact, torch.device("cpu"), torch.float32)
    sums: dict[str, torch.Tensor] = {}
    for row in ids:
        with torch.inference_mode():
            p = baseline(row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        q = artifact.logits(row)[:-1].log_softmax(-1)
        for kept in (*KEPT, p.shape[1]):
            predictions.TOP = kept
            found = predictions.compare(predictions.predictions_of(p, row[1:]), q)
            mean = torch.stack([found.kl.mean(), found.total_variation.mean()])
            name = str(kept) if kept < p.shape[1] else "all"
            sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + mean / len(ids)
    whole = sums["all"]
    rows = [
        {
            "kept": name,
            "kl": float(kl),
            "kl_below": 1 - float(kl / whole[0]),
            "tv": float(tv),
            "tv_below": 1 - float(tv / whole[1]),
        }
        for name, (kl, tv) in sums.items()
    ]
    print(json.dumps({"artifact": given.artifact.name, "tokens": ids.numel(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
