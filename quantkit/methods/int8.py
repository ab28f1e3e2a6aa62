"""LLM.int8: row-wise absmax int8 weights; activations are quantized at run time, outlier columns kept in half precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantkit.methods.base import Method


class INT8(Method):
    name: Literal["int8"] = "int8"
    threshold: float = Field(6.0, ge=0, description="activations above this magnitude go through in half precision")
