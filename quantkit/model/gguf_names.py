"""What GGUF calls things: tensors, architectures and the order of rotary rows, as data both ways."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.model.blocks import head_dim

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_OUTSIDE_BACK = {gguf: hf for hf, gguf in _OUTSIDE.items()}
_INSIDE_BACK = {gguf: hf for hf, gguf in _INSIDE.items()}

ROPE_FACTORS = "rope_freqs.weight"
"""The divisors of the rotary frequencies that Llama 3 models store; part of the config, not a weight."""


@dataclass(frozen=True)
class Family:
    """A GGUF architecture and the Hugging Face model it is.

    interleaved: rotary pairs are neighbouring rows of the q and k projections (Hugging Face keeps halves), so those
    rows are permuted in the file.
    """

    architecture: str
    hf_class: str
    model_type: str
    interleaved: bool = False
    attention_bias: bool | None = None  # None: the config tells


FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", interleaved=True),
    Family("llama", "MistralForCausalLM", "mistral", interleaved=True, attention_bias=False),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", attention_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3"),
)
"""The first entry of an architecture is what a file of it is read as: a Mistral is a Llama in every computation."""


def to_gguf(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor, None when there is none."""
    module, dot, part = name.rpartition(".")
    if not dot or part not in ("weight", "bias"):
        return None
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{part}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if found and found.group(2) in _INSIDE:
        return f"blk.{found.group(1)}.{_INSIDE[found.group(2)]}.{part}"
    return None


def to_hf(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None when there is none."""
    module, dot, part = name.rpartition(".")
    if not dot or part not in ("weight", "bias"):
        return None
    if module in _OUTSIDE_BACK:
        return f"{_OUTSIDE_BACK[module]}.{part}"
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    if found and found.group(2) in _INSIDE_BACK:
        return f"model.layers.{found.group(1)}.{_INSIDE_BACK[found.group(2)]}.{part}"
    return None


def file_order(name: str) -> tuple[int, int, int, str]:
    """A sort key for Hugging Face names: embedding, blocks in order, final norm, head; the same for every source."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found:
        places = list(_INSIDE)
        place = places.index(found.group(2)) if found.group(2) in _INSIDE else len(places)
        return (1, int(found.group(1)), place, found.group(3))
    places = list(_OUTSIDE)
    module = name.rpartition(".")[0]
    place = places.index(module) if module in _OUTSIDE else len(places)
    return (0 if place == 0 else 2, 0, place, name)


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

    A head's rows x0..x(d/2-1), y0..y(d/2-1) become x0, y0, x1, y1, ... Source: llama.cpp, the Llama converter.
    """
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


def deinterleave(heads: int, rows: int) -> Tensor:
    """The inverse of `interleave`: which row of the file stands at each Hugging Face row, int64 [rows]."""
    return torch.argsort(interleave(heads, rows))


def rope_dimensions(config: dict[str, Any]) -> int:
    """Channels of a head that are rotated: all of them in every family of the table."""
    dimensions = head_dim(config)
    assert dimensions is not None, "the config of every family has its head sizes"
    return dimensions
