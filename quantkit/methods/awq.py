"""AWQ: activation-aware weight quantization."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from quantkit.methods.base import Method


class AWQ(Method):
    calibrated: ClassVar[bool] = True
    name: Literal["awq"] = "awq"
    bits: Literal[4] = 4
    group_size: int | None = Field(128, ge=8)
    zero_point: bool = True
    rounding: Literal["nearest", "gptq"] = "gptq"
    clip: bool = True
    exponents: int = Field(20, ge=1, le=200)
    propagate: Literal["unquantized", "quantized"] = "unquantized"
