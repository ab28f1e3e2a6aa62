"""Round to nearest: the baseline that every calibrated method has to beat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantkit.methods.base import Method


class RTN(Method):
    name: Literal["rtn"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(128, ge=8, description="input columns a scale; null is the whole row")
    symmetric: bool = False
