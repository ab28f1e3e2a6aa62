"""The arithmetic of memory: weights, KV cache, overhead; from a model's headers alone, or per parameter without one."""

from __future__ import annotations

import math
from typing import Any

import torch

from quantkit.advise.rules import Rules
from quantkit.errors import RecipeError
from quantkit.model.blocks import head_dim
from quantkit.model.source import Source
from quantkit.plan import check_plans, plan_linears
from quantkit.recipe import Recipe

UNQUANTIZED_BYTES = 2
"""Bytes of a value that stays in 16 bits."""


def weight_bytes(name: str, recipe: Recipe, source: Source) -> int:
    """How many bytes an artifact's weights take. Raises RecipeError when the recipe does not fit the model."""
    plans = plan_linears(recipe, source)
    check_plans(name, recipe, source, plans)
    return recipe.resolved_format.layout(source, plans, getattr(torch, recipe.model.dtype)).total_bytes


def unquantized_bytes(source: Source) -> int:
    """Bytes of all weights in 16 bits."""
    return UNQUANTIZED_BYTES * parameters(source)


def parameters(source: Source) -> int:
    """How many weights a model stores."""
    return sum(math.prod(source.shape(name)) for name in source.names())


def bits_per_weight(recipe: Recipe, rules: Rules) -> float:
    """Bits that a weight of a typical layer takes, scales and zeros included."""
    return recipe.method.predicted_bits(*rules.typical_layer)


def cache_bytes(config: dict[str, Any], context: int, rules: Rules) -> int | None:
    """Keys and values of one sequence: 2 * layers * KV heads * head size * tokens. None where the config lacks these.

    Layers with a sliding window keep less; the sum is then what they take at most.
    """
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or config.get("n_head")
    size = head_dim(config)
    if size is None and config.get("n_embd") and config.get("n_head"):
        size = int(config["n_embd"]) // int(config["n_head"])
    if not layers or not heads or not size:
        return None
    return 2 * int(layers) * int(heads) * size * context * rules.cache_bytes_per_value


def needed(weights: float, cache: float, rules: Rules) -> float:
    """Bytes that an engine needs for weights and cache, overhead included."""
    return weights * (1 + rules.overhead.share) + cache + rules.overhead.fixed_bytes


def parameters_that_fit(memory: float, bits: float, rules: Rules) -> float:
    """The largest model in parameters whose weights fit, with nothing left for a KV cache."""
    return max(0.0, (memory - rules.overhead.fixed_bytes) / (1 + rules.overhead.share) / (bits / 8))


def misfit(name: str, error: RecipeError) -> str:
    """Why a recipe does not fit a model, in one line."""
    first = error.message.splitlines()[0].removeprefix(f"{name}: ")
    return f"{first}; {error.hint}" if error.hint else first
