"""NF4 (QLoRA): 4-bit codes into the quantiles of a normal distribution, one absmax a block of 64 weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantkit.methods.base import Method


class NF4(Method):
    name: Literal["nf4"] = "nf4"
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = Field(True, description="quantize the blocks' absmax to 8 bits as well")
    compute_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
