"""Whether llama.cpp and decoded weights agree on GGUF files: perplexity and KL both ways, and from one to the other.

    python benchmarks/llama_agreement.py --model MODEL [--out benchmarks/results/llama_agreement.json]

MODEL is a folder or a .gguf file; it is quantized here to each type. Decoded weights run in transformers in float32.
A third run, of decoded weights again, rounds the inputs of every product to 8 bits in the blocks that ggml rounds
them in: how far that moves decoded weights is what the rounding of activations accounts for. Which way a value goes
hangs on the last digits of what came before it, so the two do not land on the same spot. Needs the extra llama-cpp.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.quiet import quiet_libraries

quiet_libraries()

from quantkit import jobs  # noqa: E402
from quantkit.bench.predictions import compare_whole  # noqa: E402
from quantkit.bench.statistics import standard_error  # noqa: E402
from quantkit.bench.subject import Artifact, Baseline  # noqa: E402
from quantkit.engines import DECODED, Session  # noqa: E402
from quantkit.environment import environment  # noqa: E402
from quantkit.formats import open_artifact  # noqa: E402
from quantkit.formats.base import ArtifactSource  # noqa: E402
from quantkit.model.blocks import architecture_of  # noqa: E402
from quantkit.model.calibration import load_calibration  # noqa: E402
from quantkit.model.reader import open_source  # noqa: E402
from quantkit.progress import Progress  # noqa: E402
from quantkit.sections import CalibrationSection  # noqa: E402

CPU = torch.device("cpu")
FILES = {
    "F16": ("gguf-q8_0", "method.type=f16", "method.embedding_type=f16"),
    "Q8_0": ("gguf-q8_0",),
    "Q4_0": ("gguf-q4_0",),
    "Q4_K_M": ("gguf-q4_k_m",),
    "IQ4_NL": ("gguf-iq4_nl",),
}
"""Recipe and settings of each file; F16 has no rounded weights, so it shows what the engines differ by otherwise."""


def as_ggml_multiplies(values: Tensor, type_name: str) -> Tensor:
    """Inputs [..., columns] of a product with weights of a type, rounded as ggml rounds them on a CPU.

    Blocks of 256 with a float32 scale for the K types and IQ4_XS, blocks of 32 with a float16 scale for the others.
    """
    if type_name in ("F16", "BF16"):
        return values.to(torch.float16 if type_name == "F16" else torch.bfloat16).float()
    wide = type_name.endswith("_K") or type_name == "IQ4_XS"
    blocks = values.float().unflatten(-1, (-1, 256 if wide else 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / torch.where(scale > 0, scale, 1)).round()
    return (codes * (scale if wide else scale.half().float())).flatten(-2)


def round_inputs(session: Session, source: ArtifactSource) -> None:
    """Let every linear of decoded weights see the inputs that ggml would multiply with."""
    model: Any = session.model
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = f"{name}.weight"
            if name == architecture_of(source.config).head and source.tied_head:
                weight = f"{architecture_of(source.config).embedding}.weight"
            kind = source.info(weight).type_name  # type: ignore[attr-defined]
            module.register_forward_pre_hook(lambda _, given, kind=kind: (as_ggml_multiplies(given[0], kind),))


def losses(log_probs: Tensor, ids: Tensor) -> float:
    return float(-log_probs.gather(1, ids[1:, None]).double().mean())


def measure(folder: Path, baseline: list[Tensor], windows: Tensor) -> dict[str, Any]:
    """One row: every window goes through llama.cpp, the decoded weights, and these with rounded inputs."""
    artifact = Artifact(folder)
    llama = artifact.for_quality(CPU)
    assert llama.engine == "llama.cpp", llama.details
    decoded, rounded = DECODED.load(folder, CPU, torch.float32), DECODED.load(folder, CPU, torch.float32)
    round_inputs(rounded, open_artifact(folder))
    found: dict[str, list[float]] = defaultdict(list)
    for ids, before in zip(windows, baseline, strict=True):
        both = {
            name: session.logits(ids)[:-1].log_softmax(-1) for name, session in (("llama", llama), ("decoded", decoded))
        }
        for name, log_probs in both.items():
            found[f"{name}_loss"].append(losses(log_probs, ids))
            found[f"{name}_kl"].append(compare_whole(before, log_probs)[0])
        kl, same = compare_whole(both["decoded"], both["llama"])
        found["between_kl"].append(kl)
        found["between_top1"].append(same)
        found["rounded_kl"].append(compare_whole(both["decoded"], rounded.logits(ids)[:-1].log_softmax(-1))[0])
    settings = {"dtype": llama.dtype, **llama.details}
    for session in (llama, decoded, rounded):
        session.close()
    means = {name: math.fsum(values) / len(values) for name, values in found.items()}
    apart = [one - other for one, other in zip(found["llama_kl"], found["decoded_kl"], strict=True)]
    return {
        "llama.cpp": {"perplexity": math.exp(means["llama_loss"]), "kl": means["llama_kl"], "settings": settings},
        "decoded weights": {"perplexity": math.exp(means["decoded_loss"]), "kl": means["decoded_kl"]},
        "kl_difference": math.fsum(apart) / len(apart),
        "kl_difference_error": standard_error(apart),
        "kl_between": means["between_kl"],
        "top1_between": means["between_top1"],
        "kl_of_rounded_inputs": means["rounded_kl"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--set", default="pydoc", help="a calibration set, whose evaluation part is taken, or a file")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/llama_agreement.json"))
    given = parser.parse_args()
    source = open_source(given.model)
    section = CalibrationSection(set=given.set, sequences=given.sequences, length=given.length)
    windows = load_calibration(section, source.tokenizer_folder(), "evaluation").ids
    session = Baseline(source).for_quality(CPU)
    baseline = [session.logits(ids)[:-1].log_softmax(-1) for ids in windows]
    perplexity = math.exp(math.fsum(losses(*pair) for pair in zip(baseline, windows, strict=True)) / len(windows))
    session.close()
    rows, threads = [], torch.get_num_threads()
    for label, (recipe, *settings) in FILES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / label
            quiet = Progress(quiet=True)
            kept = {"settings": settings, "device": "cpu", "force": False, "progress": quiet}
            made = jobs.quantize(recipe, model=given.model, out=folder, **kept)  # type: ignore[arg-type]
            torch.set_num_threads(threads)  # numba's threads change it
            row = {"file": label, "bits_per_weight": made.bits_per_weight_all, **measure(folder, baseline, windows)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    text = {"set": Path(given.set).name, "sequences": given.sequences, "length": given.length}
    results = {
        "model": Path(given.model).name,
        "text": text,
        "baseline_perplexity": perplexity,
        "files": rows,
        "environment": environment(),
    }
    given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
