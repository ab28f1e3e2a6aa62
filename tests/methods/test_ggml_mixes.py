"""The rules of the mixes, beside what llama.cpp's own snapshots of them say of whole models."""

from __future__ import annotations

from typing import get_args

import pytest

from quantkit.maths.ggml import ENCODABLE
from quantkit.methods.ggml import MixName, PlainType
from quantkit.methods.ggml_mixes import FALLBACKS, MIXES, PLAIN, Facts, fitted, type_of

QWEN3_06B = Facts(layers=28, heads_a_group=2, tied=False)  # the snapshot counts its head as a tensor of its own
QWEN3_14B = Facts(layers=40, heads_a_group=5, tied=False)
LLAMA_70B = Facts(layers=80, heads_a_group=8, tied=False, llama_70b=True)
KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MORE_BITS_28 = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
MORE_BITS_40 = [0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39]
EVERY_28, EVERY_40, EVERY_80 = list(range(28)), list(range(40)), list(range(80))

Expected = dict[str, dict[str, list[int]]]
SNAPSHOTS: list[tuple[Facts, str, Expected]] = [
    (QWEN3_06B, "q2_k", {"Q3_K": {"attn_v": EVERY_28, "attn_output": EVERY_28, "ffn_down": EVERY_28}}),
    (QWEN3_06B, "q2_k_s", {"Q4_K": {"ffn_down": [0, 1, 2]}}),
    (QWEN3_06B, "q3_k_s", {}),
    (
        QWEN3_06B,
        "q3_k_m",
        {
            "Q4_K": {"attn_v": EVERY_28[2:], "attn_output": EVERY_28, "ffn_down": EVERY_28[1:]},
            "Q5_K": {"attn_v": [0, 1], "ffn_down": [0]},
        },
    ),
    (QWEN3_06B, "q3_k_l", {"Q5_K": {"attn_v": EVERY_28, "attn_output": EVERY_28, "ffn_down": EVERY_28}}),
    (QWEN3_06B, "q4_k_s", {"Q5_K": {"attn_v": [0, 1, 2, 3], "ffn_down": [0, 1, 2]}}),
    (QWEN3_06B, "q4_k_m", {"Q6_K": {"attn_v": MORE_BITS_28, "ffn_down": MORE_BITS_28}}),
    (QWEN3_06B, "q5_k_s", {}),
    (QWEN3_06B, "q5_k_m", {"Q6_K": {"attn_v": MORE_BITS_28, "ffn_down": MORE_BITS_28}}),
    (QWEN3_06B, "q6_k", {}),
    (
        QWEN3_14B,
        "q2_k",
        {"Q4_K": {"attn_v": EVERY_40}, "Q3_K": {"attn_output": EVERY_40, "ffn_down": EVERY_40}},
    ),
    (QWEN3_14B, "q2_k_s", {"Q4_K": {"attn_v": EVERY_40, "ffn_down": [0, 1, 2, 3, 4]}}),
    (
        QWEN3_14B,
        "q3_k_m",
        {
            "Q4_K": {"attn_v": EVERY_40[2:], "attn_output": EVERY_40, "ffn_down": EVERY_40[2:]},
            "Q5_K": {"attn_v": [0, 1], "ffn_down": [0, 1]},
        },
    ),
    (QWEN3_14B, "q4_k_s", {"Q5_K": {"attn_v": [0, 1, 2, 3], "ffn_down": [0, 1, 2, 3, 4]}}),
    (QWEN3_14B, "q4_k_m", {"Q6_K": {"attn_v": MORE_BITS_40, "ffn_down": MORE_BITS_40}}),
    (LLAMA_70B, "q2_k", {"Q5_K": {"attn_v": EVERY_80}, "Q3_K": {"attn_output": EVERY_80, "ffn_down": EVERY_80}}),
    (LLAMA_70B, "q3_k_s", {"Q5_K": {"attn_v": EVERY_80}}),
    (
        LLAMA_70B,
        "q3_k_m",
        {
            "Q5_K": {"attn_v": EVERY_80, "ffn_down": [0, 1, 2, 3, 4]},
            "Q4_K": {"attn_output": EVERY_80, "ffn_down": EVERY_80[5:]},
        },
    ),
]
"""From llama.cpp, tests/snapshots/{qwen3-0.6b,qwen3-14b,meta-llama-3.1-70b-instruct}.schema."""


@pytest.mark.parametrize(("facts", "mix", "expected"), SNAPSHOTS, ids=lambda value: str(value)[:24])
def test_types_are_those_of_the_snapshots(facts: Facts, mix: str, expected: Expected) -> None:
    wanted = {f"blk.{layer}.{kind}.weight": MIXES[mix] for layer in range(facts.layers) for kind in KINDS}
    for type_name, kinds in expected.items():
        wanted |= {f"blk.{layer}.{kind}.weight": type_name for kind, layers in kinds.items() for layer in layers}
    assert {name: type_of(mix, name, 1024, facts) for name in wanted} == wanted
    assert type_of(mix, "output.weight", 1024, facts) == "Q6_K"
    assert type_of(mix, "token_embd.weight", 1024, facts) == MIXES[mix]


@pytest.mark.parametrize("mix", ["iq4_nl", "iq4_xs"])
def test_rules_that_depend_on_importance(mix: str) -> None:
    weighed = Facts(28, 2, False, importance=True)
    assert [type_of(mix, f"blk.{i}.ffn_down.weight", 256, QWEN3_06B) for i in (2, 3)] == ["Q5_K", MIXES[mix]]
    assert type_of(mix, "blk.2.ffn_down.weight", 256, weighed) == MIXES[mix]
    assert type_of(mix, "blk.9.attn_v.weight", 256, QWEN3_06B) == MIXES[mix]
    assert type_of(mix, "blk.9.attn_v.weight", 256, QWEN3_14B) == "Q5_K"
    assert [type_of("q4_0", f"blk.{i}.ffn_down.weight", 256, weighed) for i in (2, 3)] == ["Q4_1", "Q4_0"]
    assert type_of("q5_0", "blk.2.ffn_down.weight", 256, weighed) == "Q5_1"
    assert type_of("q4_0", "blk.2.ffn_down.weight", 256, QWEN3_06B) == "Q4_0"


def test_a_tied_embedding_is_the_head() -> None:
    tied = Facts(28, 2, True)
    assert type_of("q4_k_m", "token_embd.weight", 1024, tied) == "Q6_K"
    assert type_of("q4_k_m", "token_embd.weight", 576, tied) == "Q8_0"
    assert type_of("iq4_nl", "token_embd.weight", 576, tied) == "Q6_K"  # its own block divides: Q6_K, then what fits
    assert type_of("q4_0", "output.weight", 576, tied) == "Q4_0"


def test_fused_attention_follows_the_value_projection() -> None:
    assert type_of("q4_k_m", "blk.0.attn_qkv.weight", 256, QWEN3_06B) == "Q6_K"
    assert type_of("q3_k_l", "blk.9.attn_qkv.weight", 256, QWEN3_06B) == "Q5_K"


@pytest.mark.parametrize(
    ("wanted", "at_288"),
    [("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("IQ4_XS", "IQ4_NL")],
)
def test_fallbacks_by_shape(wanted: str, at_288: str) -> None:
    assert fitted(wanted, 512) == wanted
    assert fitted(wanted, 288) == at_288
    assert fitted(wanted, 80) == "F16"


def test_types_that_fit_stay() -> None:
    assert fitted("IQ4_NL", 288) == "IQ4_NL"
    assert fitted("IQ4_NL", 80) == "F16"
    assert fitted("Q4_1", 80) == "F16"


def test_the_tables_know_every_name() -> None:
    assert set(get_args(MixName)) == set(MIXES)
    assert set(get_args(PlainType)) == set(PLAIN)
    assert {*MIXES.values(), *FALLBACKS.values(), *(name.upper() for name in PLAIN)} <= set(ENCODABLE)
