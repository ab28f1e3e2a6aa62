"""The settings that quantkit reads from a config.json, a quantization_config or a GGUF header, checked before use.

Files come from anyone: a number that is a text, or a model of a billion blocks, is one message and no traceback.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from quantkit.errors import ModelError
from quantkit.patterns import regex_problem
from quantkit.validation import found

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and what was expected in words."""

MAX_BLOCKS = 2000  # the deepest published models have 126
MAX_WIDTH = 1 << 20
MAX_TOKENS = 1 << 26
SHOWN = 8


def whole(low: int, high: int, *, null: bool = False) -> Rule:
    """An integer within bounds."""

    def fits(value: Any) -> bool:
        return (null and value is None) or (type(value) is int and low <= value <= high)

    return fits, f"an integer from {low} to {high}" + (" or null" if null else "")


def number(*, null: bool = False) -> Rule:
    """A finite number above 0."""

    def fits(value: Any) -> bool:
        return (null and value is None) or (type(value) in (int, float) and 0 < value < 1e30)

    return fits, "a number above 0" + (" or null" if null else "")


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def nullable(kind: type) -> Rule:
    words = {bool: "true, false", str: "text", dict: "a mapping", list: "a list"}
    return (lambda value: value is None or isinstance(value, kind)), f"{words[kind]} or null"


def _ids(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return value is None or all(type(item) is int and -1 <= item < MAX_TOKENS for item in items)


_COUNT, _WIDTH, _LENGTH = whole(1, MAX_BLOCKS), whole(1, MAX_WIDTH), whole(1, 1 << 31)
_TEXTS: Rule = (texts, "a list of texts")
_FLAG: Rule = nullable(bool)

MODEL_RULES: dict[str, Rule] = {
    "architectures": ((lambda value: value is None or texts(value)), "a list of texts"),
    "model_type": ((lambda value: isinstance(value, str)), "text"),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _COUNT),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "n_embd", "n_head"), _WIDTH),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner"), whole(1, MAX_WIDTH, null=True)),
    "vocab_size": whole(1, MAX_TOKENS),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _LENGTH),
    "original_max_position_embeddings": whole(2, 1 << 31, null=True),
    **dict.fromkeys(("sliding_window", "sliding_window_pattern"), whole(0, 1 << 31, null=True)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq"), number(null=True)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), number(null=True)),
    **dict.fromkeys(("query_pre_attn_scalar", "partial_rotary_factor"), number(null=True)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (_ids, "token ids")),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _FLAG),
    "layer_types": ((lambda value: value is None or texts(value)), "a list of texts or null"),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), nullable(dict)),
}
"""Of config.json; keys that are absent are the business of whoever needs them."""

ROPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("rope_type", "type"), nullable(str)),
    **dict.fromkeys(("factor", "rope_theta", "low_freq_factor", "high_freq_factor"), number(null=True)),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "partial_rotary_factor"), number(null=True)),
    **dict.fromkeys(
        ("mscale", "mscale_all_dim"),
        ((lambda value: value is None or (type(value) in (int, float) and math.isfinite(value))), "a number or null"),
    ),
    "truncate": _FLAG,
    "original_max_position_embeddings": whole(2, 1 << 31, null=True),
    **dict.fromkeys(
        ("long_factor", "short_factor"),
        (
            (lambda value: isinstance(value, list) and all(type(one) in (int, float) and one > 0 for one in value)),
            "a list of numbers above 0",
        ),
    ),
    **dict.fromkeys(("full_attention", "sliding_attention"), nullable(dict)),
}


def _dynamic(value: Any) -> bool:
    """gptqmodel's rules: regexes, after "+:" or "-:", and settings."""
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(one, dict) for one in value.values())
        and all(regex_problem(re.sub(r"^[+-]:", "", rule)) is None for rule in value)
    )


_GROUP_SIZE: Rule = (
    (lambda value: value is None or (type(value) is int and (value == -1 or 0 < value <= MAX_WIDTH))),
    "-1 or the columns of a group",
)

QUANTIZATION_RULES: dict[str, Rule] = {
    "quant_method": ((lambda value: isinstance(value, str)), "text"),
    **dict.fromkeys(("bits", "w_bit"), whole(1, 32, null=True)),
    **dict.fromkeys(("group_size", "q_group_size"), _GROUP_SIZE),
    **dict.fromkeys(("sym", "desc_act", "zero_point", "load_in_8bit", "load_in_4bit", "lm_head"), _FLAG),
    "bnb_4bit_use_double_quant": _FLAG,
    **dict.fromkeys(("checkpoint_format", "version", "format", "bnb_4bit_quant_type"), nullable(str)),
    "dynamic": (_dynamic, "a mapping of regular expressions to settings"),
    "meta": nullable(dict),
    **dict.fromkeys(("config_groups", "kv_cache_scheme", "transform_config"), nullable(dict)),
}
"""Of the quantization_config of any of the formats."""


def problems_of_settings(where: str, settings: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """A line for each setting that will not do."""
    return [
        f"{where}: {key}: found {found(settings[key])}, expected {expected}"
        for key, (fits, expected) in rules.items()
        if key in settings and not fits(settings[key])
    ]


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Raises ModelError with every setting of a config.json that no model has."""
    problems = problems_of_settings(where, config, MODEL_RULES)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if isinstance(rope, dict):
            problems += problems_of_settings(f"{where}: {key}", rope, ROPE_RULES)
            for part in ("full_attention", "sliding_attention"):
                if isinstance(rope.get(part), dict):
                    problems += problems_of_settings(f"{where}: {key}.{part}", rope[part], ROPE_RULES)
    width, heads, own = config.get("hidden_size"), config.get("num_attention_heads"), config.get("head_dim")
    if not problems and width and heads and not own and width < heads:
        problems.append(f"{where}: num_attention_heads: found {heads}, expected {width} or fewer: hidden_size")
    _raise(problems)


def check_quantization(where: str, quantization: Mapping[str, Any]) -> None:
    """Raises ModelError with every setting of a quantization_config that no tool writes."""
    problems = problems_of_settings(f"{where}: quantization_config", quantization, QUANTIZATION_RULES)
    if not problems:
        for rule, changes in (quantization.get("dynamic") or {}).items():
            place = f"{where}: quantization_config: dynamic.{rule}"
            problems += problems_of_settings(place, changes, QUANTIZATION_RULES)
    _raise(problems)


def _raise(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ModelError(
            "\n".join([*problems[:SHOWN], *more]), hint="the file is damaged, or belongs to no model of this kind"
        )
