"""Rotary positions: the settings of a Hugging Face config and the keys and tensors of a GGUF file, each from the other.

Source: transformers, modeling_rope_utils.py; llama.cpp, ggml_rope and the converters of the families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.blocks import head_dim
from quantkit.model.gguf_families import Family
from quantkit.model.gguf_file import GGUFFile
from quantkit.model.gguf_names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

Need = Callable[..., float]
"""Gives the number at a key of a file's architecture, or a default."""

DEFAULT_THETA = 10000.0
"""The rotary base where config or file do not say, and that of Gemma 3's blocks with a window."""

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3 has; a file keeps only the factors that follow; `factor` is the largest of them."""


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config of any generation of transformers: rope_type, rope_theta and the rest.

    Where blocks with a window have settings of their own, these are those of the others.
    """
    found = dict(config.get("rope_scaling") or {})
    found.update(config.get("rope_parameters") or {})
    found.update(found.pop("full_attention", None) or {})
    found.pop("sliding_attention", None)
    kind = found.pop("type", None)
    found["rope_type"] = found.get("rope_type") or kind or "default"
    if found["rope_type"] == "su" or (found["rope_type"] == "yarn" and config.get("model_type") == "phi3"):
        found["rope_type"] = "longrope"  # names of the same in early checkpoints of Phi-3
    found.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if config.get("original_max_position_embeddings") and found["rope_type"] == "longrope":
        found.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    return found


def rotated_channels(config: dict[str, Any]) -> int:
    """How many of a head's channels are rotated."""
    channels = head_dim(config)
    assert channels is not None, "the config of every family has its head sizes"
    share = rope_parameters(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return int(channels * share)


def local_theta(config: dict[str, Any]) -> float:
    """The rotary base of blocks with a window. Raises ModelError when their positions are scaled, too."""
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise ModelError(
            f"config.json: rope_parameters.sliding_attention: rope_type: {local['rope_type']}; "
            "llama.cpp computes default for this family"
        )
    return float(local.get("rope_theta", config.get("rope_local_base_freq", DEFAULT_THETA)))


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


def rope_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that say in a file how frequencies are scaled, {GGUF name: float32 [rotated channels / 2]}."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {ROPE_FACTORS: llama3_factors(rope, rotated_channels(config))}
    if rope["rope_type"] == "longrope":
        return {
            LONG_FACTORS: torch.tensor(rope["long_factor"], dtype=torch.float32),
            SHORT_FACTORS: torch.tensor(rope["short_factor"], dtype=torch.float32),
        }
    return {}


def rope_metadata(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The keys of a file's architecture that rotary positions have. Raises ModelError for what GGUF cannot say."""
    if not family.ropes:
        return {}
    rope, rotated = rope_parameters(config), rotated_channels(config)
    if rotated != head_dim(config) and not family.partial_rotary:
        raise ModelError(
            f"config.json: partial_rotary_factor: {rotated} of {head_dim(config)} channels of a head are rotated; "
            "llama.cpp rotates all of them for this family"
        )
    values: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if family.architecture in ("llama", "phi3"):
        values["rope.dimension_count"] = rotated
    if family.local_theta:
        values["rope.freq_base_swa"] = local_theta(config)
    kind = rope["rope_type"]
    if kind not in family.ropes:
        raise ModelError(
            f"config.json: rope_type: {kind} cannot be written as GGUF here for {family.hf_class}; "
            f"expected one of {', '.join(family.ropes)}"
        )
    if kind in ("linear", "yarn"):
        values["rope.scaling.type"] = kind
        values["rope.scaling.factor"] = float(_setting(rope, "factor"))
        if rope.get("original_max_position_embeddings"):
            values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    if kind == "yarn":
        _check_yarn(rope)
    if kind == "longrope":
        values.update(_longrope_metadata(rope, config, rotated))
    if kind == "llama3":
        for name in ("factor", *_LLAMA3_SCALING):
            _setting(rope, name)
    return values


def _setting(rope: dict[str, Any], name: str) -> Any:
    if rope.get(name) is None:
        raise ModelError(f"config.json: rope_parameters: rope_type {rope['rope_type']} needs {name}, which is missing")
    return rope[name]


def _check_yarn(rope: dict[str, Any]) -> None:
    """Raises ModelError for settings other than those that llama.cpp computes yarn with: it reads no keys for them."""
    attention = 0.1 * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
    usual = {"attention_factor": attention, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    usual |= {"mscale": 0, "mscale_all_dim": 0}
    others = {
        name: rope[name]
        for name, value in usual.items()
        if rope.get(name) is not None and not math.isclose(rope[name], value, rel_tol=1e-4)
    }
    if others:
        raise ModelError(
            "config.json: rope_parameters: "
            + ", ".join(f"{name}: {value}, expected {usual[name]:g}" for name, value in others.items())
            + ": llama.cpp knows no others under yarn"
        )


def _longrope_metadata(rope: dict[str, Any], config: dict[str, Any], rotated: int) -> dict[str, Any]:
    original = int(_setting(rope, "original_max_position_embeddings"))
    for name in ("long_factor", "short_factor"):
        count = len(_setting(rope, name))
        if count != rotated // 2:
            raise ModelError(f"config.json: rope_parameters: {name}: {count} values; expected {rotated // 2}")
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(attention),
    }


def rope_of_file(file: GGUFFile, family: Family, need: Need, channels: int) -> dict[str, Any]:
    """The rotary settings of a config.json from a file. Raises ModelError for what no config says.

    channels: of a head. need: as `Need`.
    """
    if not family.ropes:
        return {}
    rotated = int(need("rope.dimension_count", channels))
    if rotated != channels and not family.partial_rotary:
        raise ModelError(f"{file.path}: {rotated} of {channels} channels of a head are rotated; expected all of them")
    theta = float(need("rope.freq_base", DEFAULT_THETA))
    scaling = _scaling_of_file(file, family, need, rotated)
    rope: dict[str, Any] = {"rope_theta": theta, **scaling}
    config: dict[str, Any] = {"rope_theta": theta, "rope_parameters": rope}
    if family.partial_rotary:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"] = rotated / channels
    if scaling["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if family.local_theta:
        local = float(need("rope.freq_base_swa", DEFAULT_THETA))
        config["rope_local_base_freq"] = local
        config["rope_parameters"] = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return config


def _scaling_of_file(file: GGUFFile, family: Family, need: Need, rotated: int) -> dict[str, Any]:
    """rope_type and its parameters."""
    prefix = f"{family.architecture}.rope.scaling."
    kind = file.metadata.get(f"{prefix}type", "none")
    if ROPE_FACTORS in file.tensors:
        stored = file.decoded(ROPE_FACTORS)
        rope = {"rope_type": "llama3", "factor": shortest(float(stored.max())), **_LLAMA3_SCALING}
        expected = llama3_factors({**rope, "rope_theta": need("rope.freq_base", DEFAULT_THETA)}, rotated)
        if stored.shape != expected.shape or not torch.allclose(expected, stored, rtol=1e-3):
            raise ModelError(f"{file.path}: {ROPE_FACTORS} holds factors that are not those of Llama 3's scaling")
        return rope
    if LONG_FACTORS in file.tensors and SHORT_FACTORS in file.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": [shortest(value) for value in file.decoded(LONG_FACTORS).tolist()],
            "short_factor": [shortest(value) for value in file.decoded(SHORT_FACTORS).tolist()],
            "original_max_position_embeddings": int(need("rope.scaling.original_context_length")),
            "attention_factor": float(need("rope.scaling.attn_factor", 1.0)),
        }
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in family.ropes or kind not in ("linear", "yarn"):
        known = ", ".join(["none", *(name for name in family.ropes if name in ("linear", "yarn"))])
        raise ModelError(f"{file.path}: {prefix}type: {kind} is not supported; expected one of {known}")
    rope = {"rope_type": kind, "factor": float(need("rope.scaling.factor"))}
    if f"{prefix}original_context_length" in file.metadata:
        rope["original_max_position_embeddings"] = int(need("rope.scaling.original_context_length"))
    return rope


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    single = torch.tensor(value, dtype=torch.float32)
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if torch.equal(torch.tensor(float(text), dtype=torch.float32), single):
            return float(text)
    return float(value)
