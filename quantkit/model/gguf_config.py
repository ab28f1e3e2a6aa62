"""The Hugging Face config of a model and the metadata of a GGUF file: each made from the other."""

from __future__ import annotations

import math
from typing import Any

import torch

from quantkit.errors import ModelError
from quantkit.model.blocks import head_dim
from quantkit.model.config_check import check_config
from quantkit.model.gguf_families import FAMILIES, Family
from quantkit.model.gguf_file import GGUFFile
from quantkit.model.gguf_rope import Need, rope_metadata, rope_of_file, shortest


def family_of_architecture(file: GGUFFile) -> Family:
    """What a file's general.architecture is here. Raises ModelError for one that is not in the table."""
    name = file.metadata.get("general.architecture", "(none)")
    for family in FAMILIES:
        if family.architecture == name:
            return family
    known = dict.fromkeys(family.architecture for family in FAMILIES)
    raise ModelError(
        f"{file.path}: general.architecture: {name} is not supported; expected one of {', '.join(known)}",
        hint="a family is one entry of the table in quantkit/model/gguf_families.py",
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

    config: dict[str, Any] = {"architectures": [family.hf_class], "model_type": family.model_type}
    for key in family.keys:
        full = f"{family.architecture}.{key.gguf}"
        if key.absent is not None and values.get(full, key.absent) == key.absent:
            config[key.hf] = None
            continue
        found = need(key.gguf, key.default(config) if key.default else None)
        config[key.hf] = int(found) if key.kind is int else shortest(found)
    for name, expected in family.fixed.items():
        full = f"{family.architecture}.{name}"
        if expected is None and values.get(full):
            raise ModelError(f"{file.path}: {full}: {values[full]}; expected a model without it")
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: the tensor token_embd.weight is missing; expected a whole language model")
    channels = int(need("attention.key_length", head_dim(config)))
    config |= {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
        "dtype": str(dtype).removeprefix("torch."),
        **family.fixed,
        family.context_key: int(need("context_length")),
    }
    if family.ropes:
        config["head_dim"] = channels
        config |= rope_of_file(file, family, need, channels)
    check_config(str(file.path), config)
    if family.window_period is not None:
        config |= _windows_of_file(file, family, need, config)
    if family.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config


def _windows_of_file(file: GGUFFile, family: Family, need: Need, config: dict[str, Any]) -> dict[str, Any]:
    """Which blocks attend by a window, and by what attention is divided."""
    period = int(need("attention.sliding_window_pattern", family.window_period))
    count = config["num_hidden_layers"]
    return {"layer_types": layer_types(count, period), "query_pre_attn_scalar": attention_scalar(family, config)}


def layer_types(count: int, period: int) -> list[str]:
    """The kind of each of `count` blocks when of every `period` the last attends to everything."""
    return ["full_attention" if index % period == period - 1 else "sliding_attention" for index in range(count)]


def attention_scalar(family: Family, config: dict[str, Any]) -> float:
    """The number by whose root llama.cpp divides attention in this family."""
    if config["num_hidden_layers"] == family.scalar_layers:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    channels = head_dim(config)
    assert channels is not None, "every family's config has its head sizes"
    return channels


def metadata_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a file's architecture, without its name before them, and their values.

    Integers are uint32 and floats float32 in the file. Raises ModelError for settings that GGUF cannot say.
    """
    family = family_of_config(config)
    values: dict[str, Any] = {}
    for key in family.keys:
        found = config.get(key.hf)
        if found is None:
            found = key.default(config) if key.default else key.absent
        if found is None:
            raise ModelError(f"config.json: {key.hf}: missing or null; expected a number for {family.hf_class}")
        values[key.gguf] = key.kind(found)
    channels = head_dim(config)
    assert channels is not None, "the keys above are there"
    heads = values["attention.head_count"]
    if family.hidden_heads and channels * heads != values["embedding_length"]:
        raise ModelError(
            f"config.json: {heads} heads of {channels} channels; llama.cpp expects them to be as wide as the "
            f"{values['embedding_length']} hidden channels for this family"
        )
    values |= {
        "context_length": _context(config, family),
        "attention.key_length": channels,
        "attention.value_length": channels,
        "vocab_size": _needed(config, "vocab_size", family),
        **rope_metadata(config, family),
    }
    if family.window_period is not None:
        values |= _window_metadata(config, family)
    for name, expected in family.fixed.items():
        found = config.get(name, expected)
        if found != expected and (found or expected):
            raise ModelError(f"config.json: {name}: {found}; llama.cpp computes {expected} for {family.hf_class}")
    return values


def _needed(config: dict[str, Any], key: str, family: Family) -> int:
    if config.get(key) is None:
        raise ModelError(f"config.json: {key}: missing or null; expected a number for {family.hf_class}")
    return int(config[key])


def _context(config: dict[str, Any], family: Family) -> int:
    """Tokens up to which llama.cpp computes what transformers does.

    It attends to everything where it knows no windows, which is the same within one window.
    """
    context = _needed(config, family.context_key, family)
    kinds = config.get("layer_types") or ["sliding_attention"]
    windowed = config.get("use_sliding_window", True) and "sliding_attention" in kinds
    if family.window_period is None and windowed and config.get("sliding_window"):
        context = min(context, int(config["sliding_window"]))
    return context


def _window_metadata(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Which blocks attend by a window. Raises ModelError for an order of blocks or a scale that llama.cpp lacks."""
    assert family.window_period is not None
    count = int(config["num_hidden_layers"])
    scalar = attention_scalar(family, config)
    if config.get("query_pre_attn_scalar", scalar) != scalar:
        raise ModelError(
            f"config.json: query_pre_attn_scalar: {config['query_pre_attn_scalar']}; llama.cpp computes {scalar} for "
            f"{family.hf_class} of this size"
        )
    period = int(config.get("sliding_window_pattern") or family.window_period)
    kinds = config.get("layer_types") or layer_types(count, period)
    fitting = [period for period in (family.window_period, *range(1, count + 2)) if layer_types(count, period) == kinds]
    if not fitting:
        raise ModelError(f"config.json: layer_types: {', '.join(kinds)}: blocks with a window in no order GGUF can say")
    return {} if fitting[0] == family.window_period else {"attention.sliding_window_pattern": fitting[0]}
