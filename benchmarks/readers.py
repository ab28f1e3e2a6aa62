"""Every artifact in the engine it is for, beside its decoded weights: largest difference of logits, and what each says.

    python benchmarks/readers.py ARTIFACT... [--prompt "The capital of France is"]

Needs the engines: bitsandbytes comes with quantkit, the extras `gptq` and `llama-cpp` bring the others. Decoded
weights run in float32; an engine may round activations (LLM.int8 and llama.cpp to 8 bits, gptqmodel to float16),
which is in the difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from quantkit.quiet import quiet_libraries

quiet_libraries()


def continuation(session: object, ids: torch.Tensor, count: int) -> list[int]:
    tokens = [session.prefill(ids[None])]  # type: ignore[attr-defined]
    for _ in range(count - 1):
        tokens.append(session.decode(tokens[-1]))  # type: ignore[attr-defined]
    return [int(token) for token in tokens]


def main() -> None:
    from transformers import AutoTokenizer

    from quantkit.engines import DECODED, ENGINES
    from quantkit.formats import FORMATS, open_artifact

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--prompt", default="The capital of France is")
    given = parser.parse_args()
    cpu = torch.device("cpu")
    print("artifact\tengine\tdtype\tlargest logit\tmax difference\tmean difference\tsame top token\tcontinuation")
    for path in given.artifacts:
        source = open_artifact(path)
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_folder())
        ids = torch.tensor(tokenizer(given.prompt)["input_ids"])
        name = FORMATS[source.format_name].engines[0]
        session = ENGINES[name].load(path, cpu, torch.float32)
        theirs, text = session.logits(ids), tokenizer.decode(continuation(session, ids, 8))
        dtype = session.dtype
        session.close()
        decoded = DECODED.load(path, cpu, torch.float32)
        ours = decoded.logits(ids)
        decoded.close()
        difference = (theirs - ours).abs()
        same = bool((theirs.argmax(-1) == ours.argmax(-1)).all())
        print(
            f"{path.name}\t{name}\t{dtype}\t{float(ours.abs().max()):.2f}\t{float(difference.max()):.3g}\t"
            f"{float(difference.mean()):.3g}\t{same}\t{text!r}",
            flush=True,
        )


if __name__ == "__main__":
    main()
