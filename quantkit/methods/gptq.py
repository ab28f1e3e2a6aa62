"""GPTQ."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from quantkit.methods.base import Method


class GPTQ(Method):
    calibrated: ClassVar[bool] = True
    name: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(128, ge=8)
    symmetric: bool = True
    act_order: bool = True
    damp: float = Field(0.01, gt=0, lt=1)
    propagate: Literal["unquantized", "quantized"] = "quantized"
