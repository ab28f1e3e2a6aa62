"""LLM.int8: int8 weights with one scale a row; activations are quantized at run time, outliers kept in half precision.

Source: Dettmers et al. 2022, section 2; bitsandbytes' Int8Params.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.blockwise import int8_rows
from quantkit.maths.gram import InputStatistics
from quantkit.methods.base import BlockResult, BlockWeights, Method, check_finite
from quantkit.tensors import Int8Rows


def quantize_rows(weight: Tensor) -> Int8Rows:
    """`round(weight * 127 / absmax)` of each row of a weight [out, in], rounded to float16 before, on its device: what
    bitsandbytes gives. An absmax is not finite where its row is not."""
    return Int8Rows(*int8_rows(weight))


class INT8(Method):
    """Every row in int8 with one float32 scale; any shape fits."""

    name: Literal["int8"] = "int8"
    threshold: float = Field(6.0, ge=0, description="activations above this magnitude go through in half precision")

    @property
    def compiled(self) -> bool:
        return True

    def label(self) -> str:
        return "int8"

    def predicted_bits(self, out_features: int, in_features: int) -> float:
        layout_bits = 8  # a scalar that names the layout
        return 8 + (32 * out_features + layout_bits) / (out_features * in_features)

    def quantize_block(self, given: BlockWeights, statistics: dict[str, InputStatistics]) -> BlockResult:
        quantized = {name: _checked(name, weight) for name, weight in given.weights.items()}
        return BlockResult(quantized, dict.fromkeys(quantized, self.label()))


def _checked(name: str, weight: Tensor) -> Int8Rows:
    """The rows of a weight. Raises ModelError when it is not finite, or not in float16, which int8 is made from."""
    check_finite(f"{name}.weight", weight)
    rows = quantize_rows(weight)
    if not bool(torch.isfinite(rows.absmax).all()):
        raise ModelError(
            f"{name}.weight: values up to {float(weight.abs().max()):.3g} do not fit float16, whose largest is 65504",
            hint=f"int8 is made from float16: add {name} to skip, or choose another method",
        )
    return rows
