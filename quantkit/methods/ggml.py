"""ggml's block types: the methods of GGUF files."""

from __future__ import annotations

from typing import Literal

from quantkit.methods.base import Method


class GGML(Method):
    name: Literal["ggml"] = "ggml"
    type: Literal["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = "q8_0"
    embedding_type: Literal["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = "q8_0"
