"""What a GGUF file says of the rounding that its weights have been through before anybody reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from quantkit.maths.ggml import FLOAT_TYPES
from quantkit.model.gguf_file import TensorInfo


def loss_notes(infos: Collection[TensorInfo], main_type: str, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes for a reader of results: which types the weights were rounded to, and what losses are counted against.

    infos: the tensors of the model. main_type: the type of most linears. Empty for a file without quantized tensors.
    """
    counts: Counter[str] = Counter()
    for info in infos:
        counts[info.type_name] += prod(info.shape)
    rounded = [kind for kind, _ in counts.most_common() if kind not in FLOAT_TYPES]
    if not rounded:
        return ()
    total = sum(counts.values())
    shares = ", ".join(f"{kind} {_percent(counts[kind], total)}" for kind, _ in counts.most_common())
    bits = 8 * sum(info.size for info in infos) / total
    how = f"; {weighed}" if (weighed := _weighing(metadata)) else ""
    first = f"dequantized {main_type} baseline" if main_type in rounded else f"partly dequantized {rounded[0]} baseline"
    return first, (
        f"the source had been quantized before: {shares} of the weights, {bits:.2f} bits a weight{how}; what that lost "
        "is not in these numbers: without the original weights every loss is counted against this file"
    )


def _percent(count: int, total: int) -> str:
    share = 100 * count / total
    return f"{share:.1f}%" if 0.05 <= share < 99.95 else "under 0.1%" if share < 1 else "over 99.9%"


def _weighing(metadata: Mapping[str, Any]) -> str:
    """Which importance matrix the file was made with, as its maker noted."""
    dataset = metadata.get("quantize.imatrix.dataset") or metadata.get("quantize.imatrix.file")
    return f"rounded with an importance matrix ({dataset})" if dataset else ""
