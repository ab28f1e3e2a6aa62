"""Which ggml type each tensor of a model gets under a mix such as Q4_K_M, and what a type falls back to: llama.cpp's
rules as data.

Source: llama.cpp, src/llama-quant.cpp, llama_tensor_get_type_impl and tensor_type_fallback, for dense models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from quantkit.maths.ggml import block_layout

PLAIN = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""Types that a recipe may name and that are the same for every linear."""

MIXES = {
    "q2_k": "Q2_K",
    "q2_k_s": "Q2_K",
    "q3_k_s": "Q3_K",
    "q3_k_m": "Q3_K",
    "q3_k_l": "Q3_K",
    "q4_k_s": "Q4_K",
    "q4_k_m": "Q4_K",
    "q5_k_s": "Q5_K",
    "q5_k_m": "Q5_K",
    "q6_k": "Q6_K",
    "iq4_nl": "IQ4_NL",
    "iq4_xs": "IQ4_XS",
}
"""Mixes that a recipe may name, and the type of the tensors that no rule names."""

FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What stands in for a type whose block of 256 does not divide a row. Up to 2025 Q2_K and Q3_K fell back to IQ4_NL."""

LAST_RESORT = "F16"
"""What stands in where a block of 32 does not divide the row either."""


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a model and a run.

    heads_a_group: query heads that share a key head. importance: whether columns are weighed.
    """

    layers: int
    heads_a_group: int
    tied: bool
    llama_70b: bool = False
    importance: bool = False


@dataclass(frozen=True)
class _Place:
    """One tensor of one block."""

    layer: int
    facts: Facts

    @property
    def early(self) -> bool:
        """In the first eighth of the blocks."""
        return self.layer < self.facts.layers // 8

    @property
    def more_bits(self) -> bool:
        """In the first or the last eighth, and every third block between them."""
        eighth, last = self.facts.layers // 8, 7 * self.facts.layers // 8
        return self.early or self.layer >= last or (self.layer - eighth) % 3 == 2

    @property
    def shared(self) -> bool:
        """Whether four query heads or more read each value head: its projection is small, more bits cost little."""
        return self.facts.heads_a_group >= 4


_Rule = Callable[[_Place], str | None]
"""A type, or None for the mix's own."""

_VALUE: dict[str, _Rule] = {
    "q2_k": lambda at: "Q4_K" if at.shared else "Q3_K",
    "q2_k_s": lambda at: "Q4_K" if at.shared else None,
    "q3_k_m": lambda at: "Q5_K" if at.layer < 2 else "Q4_K",
    "q3_k_l": lambda at: "Q5_K",
    "q4_k_s": lambda at: "Q5_K" if at.layer < 4 else None,
    "q4_k_m": lambda at: "Q6_K" if at.more_bits else None,
    "q5_k_m": lambda at: "Q6_K" if at.more_bits else None,
    "iq4_nl": lambda at: "Q5_K" if at.shared else None,
    "iq4_xs": lambda at: "Q5_K" if at.shared else None,
}

_DOWN: dict[str, _Rule] = {
    "q2_k": lambda at: "Q3_K",
    "q2_k_s": lambda at: "Q4_K" if at.early else None,
    "q3_k_m": lambda at: "Q5_K" if at.layer < at.facts.layers // 16 else "Q4_K",
    "q3_k_l": lambda at: "Q5_K",
    "q4_k_s": lambda at: "Q5_K" if at.early else None,
    "q4_k_m": lambda at: "Q6_K" if at.more_bits else None,
    "q5_k_m": lambda at: "Q6_K" if at.more_bits else None,
    "iq4_nl": lambda at: "Q5_K" if at.early and not at.facts.importance else None,
    "iq4_xs": lambda at: "Q5_K" if at.early and not at.facts.importance else None,
    "q4_0": lambda at: "Q4_1" if at.early and at.facts.importance else None,
    "q5_0": lambda at: "Q5_1" if at.early and at.facts.importance else None,
}

_OUTPUT: dict[str, _Rule] = {
    "q2_k": lambda at: "Q3_K",
    "q3_k_m": lambda at: "Q4_K",
    "q3_k_l": lambda at: "Q5_K",
}

_RULES = {"attn_v": _VALUE, "attn_qkv": _VALUE, "ffn_down": _DOWN, "attn_output": _OUTPUT}
"""The rules of each kind of tensor, by its name in GGUF."""


def type_of(kind: str, name: str, columns: int, facts: Facts) -> str:
    """The ggml type that a recipe's type wants for a tensor, before its shape has been looked at.

    kind: a plain type or a mix, lower case. name: of the tensor in GGUF, such as "blk.3.attn_v.weight". columns: of
    its rows; the head of a mix takes another type where the mix's own would not fit.
    """
    base = MIXES.get(kind, kind.upper())
    tensor = name.removesuffix(".weight")
    if tensor == "output" or (tensor == "token_embd" and facts.tied):
        if kind in PLAIN:
            return base
        return "Q8_0" if columns % block_layout(base)[0] else "Q6_K"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", tensor)
    if found is None:
        return base
    rule = _RULES.get(found[2], {}).get(kind)
    wanted = (rule(_Place(int(found[1]), facts)) if rule is not None else None) or base
    if facts.llama_70b and found[2] in ("attn_v", "attn_qkv") and wanted in ("Q3_K", "Q4_K"):
        return "Q5_K"  # eight query heads share a value head there
    return wanted


def fitted(wanted: str, columns: int) -> str:
    """The type itself where its block divides a row of `columns` weights, else what stands in for it."""
    for found in (wanted, FALLBACKS.get(wanted, LAST_RESORT)):
        if columns % block_layout(found)[0] == 0:
            return found
    return LAST_RESORT


def misfit_reason(wanted: str, columns: int) -> str:
    """Why a tensor does not get the type that it should."""
    return f"{wanted} has blocks of {block_layout(wanted)[0]}, which do not divide its {columns} columns"
