"""What GGUF calls tensors and how it lays them out, both ways, by the table of families."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.gguf_families import Family

ROPE_FACTORS = "rope_freqs.weight"
"""The divisors of the rotary frequencies that Llama 3 models store; part of the config, not a weight."""

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Those of longrope, for texts beyond the length that the model was first trained on and up to it."""

CONFIG_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def to_gguf(name: str, family: Family) -> str | None:
    """The GGUF name of a Hugging Face tensor, None when there is none."""
    module, dot, part = name.rpartition(".")
    if not dot or part not in ("weight", "bias"):
        return None
    if module in family.names.outside:
        return f"{family.names.outside[module]}.{part}"
    found = re.fullmatch(re.escape(family.names.block) + r"\.(\d+)\.(.+)", module)
    if found and found.group(2) in family.names.inside:
        return f"blk.{found.group(1)}.{family.names.inside[found.group(2)]}.{part}"
    return None


def to_hf(name: str, family: Family) -> str | None:
    """The Hugging Face name of a GGUF tensor, None when there is none."""
    module, dot, part = name.rpartition(".")
    if not dot or part not in ("weight", "bias"):
        return None
    for hf, gguf in family.names.outside.items():
        if module == gguf:
            return f"{hf}.{part}"
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    if found:
        for hf, gguf in family.names.inside.items():
            if found.group(2) == gguf:
                return f"{family.names.block}.{found.group(1)}.{hf}.{part}"
    return None


def file_order(name: str, family: Family) -> tuple[int, int, int, str]:
    """A sort key for Hugging Face names: embedding, blocks in order, final norm, head; the same for every source."""
    found = re.fullmatch(re.escape(family.names.block) + r"\.(\d+)\.(.+)\.(weight|bias)", name)
    if found:
        places = list(family.names.inside)
        place = places.index(found.group(2)) if found.group(2) in places else len(places)
        return (1, int(found.group(1)), place, found.group(3))
    places = list(family.names.outside)
    module = name.rpartition(".")[0]
    if module not in places:
        return (2, 0, len(places), name)
    return (0 if family.names.outside[module].endswith("embd") else 2, 0, places.index(module), name)


def rotary_heads(name: str, config: dict[str, Any]) -> int | None:
    """Heads of a q or k projection's rows, None for every other tensor. name: a Hugging Face name, weight or bias."""
    module = name.rpartition(".")[0]
    if module.endswith("self_attn.q_proj"):
        return int(config["num_attention_heads"])
    if module.endswith("self_attn.k_proj"):
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


def interleave(heads: int, rows: int) -> Tensor:
    """Which Hugging Face row stands at each row of the file: int64 [rows].

    A head's rows x0..x(d/2-1), y0..y(d/2-1) become x0, y0, x1, y1, ... Raises ModelError when the heads do not share
    the rows in pairs. Source: llama.cpp, the Llama converter.
    """
    if rows % (2 * heads):
        raise ModelError(
            f"{heads} heads do not share {rows} rows of a projection in pairs: header and tensors belong to two models"
        )
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


def deinterleave(heads: int, rows: int) -> Tensor:
    """The inverse of `interleave`: which row of the file stands at each Hugging Face row, int64 [rows]."""
    return torch.argsort(interleave(heads, rows))


def norm_offset(name: str, family: Family) -> float:
    """What the file holds more than the Hugging Face tensor: 1 for the gains of Gemma, 0 else."""
    return family.norm_offset if name.endswith("norm.weight") else 0.0


def is_transposed(name: str, dimensions: int, family: Family) -> bool:
    """Whether rows and columns of a Hugging Face tensor change places in the file."""
    return family.transposed and dimensions == 2 and name.startswith(f"{family.names.block}.")
