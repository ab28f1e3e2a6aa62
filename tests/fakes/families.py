"""Tiny random models of every family that GGUF is written for; all values are float16's, so that F16 holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, object] = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=384,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    tie_word_embeddings=False,
)

SETTINGS: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": {},
    "qwen3": dict(head_dim=32),
    "gemma2": dict(
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
        tie_word_embeddings=True,
    ),
    "gemma3_text": dict(
        num_hidden_layers=7,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        tie_word_embeddings=True,
    ),
    "phi3": dict(sliding_window=None, original_max_position_embeddings=256),
    "gpt2": dict(n_embd=64, n_layer=3, n_head=4, n_positions=256),
}
"""What differs from the sizes above; the models' own defaults where nothing is said."""

HALVES = ("gemma2", "gemma3_text")
"""Families whose normalizations multiply by one more than the gain."""


def family_config(kind: str, **changes: object) -> dict[str, Any]:
    """The config.json of a tiny model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(SIZES | SETTINGS[kind] | changes))
    names = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": names}


def write_family(folder: Path, kind: str, tokenizer_from: Path, **changes: object) -> Path:
    """A random model with a seed of its own in a Hugging Face folder, with the tokenizer of another folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | SETTINGS[kind] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        gain = name.endswith("weight") and ("norm" in name or ".ln_" in name)
        centre = 1.0 if gain and kind not in HALVES else 0.0
        parameter.data.normal_(centre, 0.08)
        parameter.data.copy_(parameter.data.half().float())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder
