"""The Hugging Face config of a model and the metadata of a GGUF file: each made from the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.blocks import head_dim
from quantkit.model.gguf_file import GGUFFile
from quantkit.model.gguf_names import FAMILIES, ROPE_FACTORS, Family

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3 has; a file keeps only the factors that follow; `factor` is the largest of them."""


def family_of_architecture(file: GGUFFile) -> Family:
    """What a file's general.architecture is here. Raises ModelError for one that is not in the table."""
    name = file.metadata.get("general.architecture", "(none)")
    for family in FAMILIES:
        if family.architecture == name:
            return family
    known = sorted({family.architecture for family in FAMILIES})
    raise ModelError(
        f"{file.path}: general.architecture: {name} is not supported; expected one of {', '.join(known)}",
        hint="a family is one entry of the table in quantkit/model/gguf_names.py",
    )


def family_of_config(config: dict[str, Any]) -> Family:
    """How a Hugging Face model is stored in GGUF. Raises ModelError for a model that is not in the table."""
    names = config.get("architectures") or ["(none)"]
    for family in FAMILIES:
        if family.hf_class in names:
            return family
    known = ", ".join(family.hf_class for family in FAMILIES)
    raise ModelError(
        f"config.json: architectures: {', '.join(names)} has no GGUF converter here; expected one of {known}"
    )


def config_of_file(file: GGUFFile, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that a GGUF file's metadata stand for.

    Raises ModelError when a key is missing, or the file scales its rotary positions in a way that no config says.
    """
    family = family_of_architecture(file)
    values = file.metadata

    def need(key: str, default: float | None = None) -> float:
        full = f"{family.architecture}.{key}"
        found = values.get(full, default)
        if found is None:
            raise ModelError(f"{file.path}: the header lacks {full}", hint="convert the model again with llama.cpp")
        if not isinstance(found, int | float) or not 0 < found < math.inf:
            shown = "a value for each block" if isinstance(found, list) else repr(found)
            raise ModelError(f"{file.path}: {full}: {shown}; expected one number above 0")
        return found

    heads = int(need("attention.head_count"))
    hidden = int(need("embedding_length"))
    channels = int(need("attention.key_length", hidden // heads))
    rotated = int(need("rope.dimension_count", channels))
    if rotated != channels:
        raise ModelError(f"{file.path}: {rotated} of {channels} channels of a head are rotated; expected all of them")
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: the tensor token_embd.weight is missing; expected a whole language model")
    theta = float(need("rope.freq_base", 10000.0))
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": int(need("feed_forward_length")),
        "num_hidden_layers": int(need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(need("attention.head_count_kv", heads)),
        "head_dim": channels,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, **_rope_of_file(file, family.architecture, need, channels)},
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": int(need("context_length")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if family.model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if family.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    single = torch.tensor(value, dtype=torch.float32)
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if torch.equal(torch.tensor(float(text), dtype=torch.float32), single):
            return float(text)
    return float(value)


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config of any generation of transformers: rope_type, rope_theta and the rest."""
    found = dict(config.get("rope_scaling") or {})
    found.update(config.get("rope_parameters") or {})
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def llama3_factors(rope: dict[str, Any], channels: int) -> Tensor:
    """The divisor of each rotary frequency under Llama 3's scaling: float32 [channels / 2].

    Source: transformers, modeling_rope_utils.py, the llama3 type; llama.cpp's converter stores these as rope_freqs.
    """
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    powers = torch.arange(0, channels, 2, dtype=torch.float32) / channels
    wavelength = 2 * math.pi * torch.tensor(float(rope["rope_theta"])) ** powers
    smooth = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelength > context / low, torch.full_like(wavelength, factor), between)
    return torch.where(wavelength < context / high, torch.ones_like(wavelength), factors)


def _rope_of_file(file: GGUFFile, architecture: str, need: Callable[..., float], channels: int) -> dict[str, Any]:
    """rope_type and its parameters. need: gives the number at a key of the architecture, or a default."""
    prefix = f"{architecture}.rope.scaling."
    kind = file.metadata.get(f"{prefix}type", "none")
    if ROPE_FACTORS in file.tensors:
        stored = file.decoded(ROPE_FACTORS)
        rope = {"rope_type": "llama3", "factor": _shortest(float(stored.max())), **_LLAMA3_SCALING}
        expected = llama3_factors({**rope, "rope_theta": need("rope.freq_base", 10000.0)}, channels)
        if stored.shape != expected.shape or not torch.allclose(expected, stored, rtol=1e-3):
            raise ModelError(f"{file.path}: {ROPE_FACTORS} holds factors that are not those of Llama 3's scaling")
        return rope
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{file.path}: {prefix}type: {kind} is not supported; expected none, linear or yarn")
    rope = {"rope_type": kind, "factor": float(need("rope.scaling.factor"))}
    if f"{prefix}original_context_length" in file.metadata:
        rope["original_max_position_embeddings"] = int(need("rope.scaling.original_context_length"))
    return rope


def metadata_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a file's architecture, without its name before them, and their values.

    Integers are uint32 and floats float32 in the file. Raises ModelError for settings that GGUF cannot say.
    """
    family = family_of_config(config)
    rope = rope_parameters(config)
    channels = head_dim(config)
    assert channels is not None, "every family's config has its head sizes"
    context = int(config["max_position_embeddings"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        # llama.cpp attends to everything for these architectures, which is the same within one window
        context = min(context, int(config["sliding_window"]))
    values: dict[str, Any] = {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": context,
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": int(config["num_attention_heads"]),
        "attention.head_count_kv": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "attention.key_length": channels,
        "attention.value_length": channels,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": int(config["vocab_size"]),
    }
    if family.architecture == "llama":
        values["rope.dimension_count"] = channels
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        values["rope.scaling.type"] = kind
        values["rope.scaling.factor"] = float(rope["factor"])
        if rope.get("original_max_position_embeddings"):
            values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise ModelError(
            f"config.json: rope_type: {kind} cannot be written as GGUF here; expected default, linear, yarn or llama3"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act: {config['hidden_act']}; llama.cpp computes silu for this family")
    return values
