"""AWQ (Lin et al. 2023): scales that protect the input channels which matter, folded into what stands before.

Scales are found by the Gram score (maths/fold.py), ranges by the clip search (maths/affine.py). `rounding: gptq` then
rounds the scaled weights with error compensation instead of to nearest; the file is a plain AWQ file either way.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from quantkit.methods.base import Scales, affine_bits, affine_misfit
from quantkit.methods.calibrated import CalibratedMethod, Correction, Pairs, Steps
from quantkit.tensors import Grid


class AWQ(CalibratedMethod):
    """Settings of AWQ; the seed settings of the field are 4 bits, zero point, group 128."""

    name: Literal["awq"] = "awq"
    bits: Literal[4] = 4
    group_size: int | None = Field(128, ge=8, description="input columns a scale; null is the whole row")
    zero_point: bool = Field(True, description="asymmetric grid")
    rounding: Literal["nearest", "gptq"] = Field(
        "gptq", description="how the scaled weights are rounded; nearest, by scales: inputs, is the method of the paper"
    )
    clip: bool = Field(True, description="search each group's range for the one that loses least")
    exponents: int = Field(4, ge=1, le=200, description="steps of the search for scales")
    scales: Scales = "balanced"
    damp: float = Field(0.01, gt=0, lt=1, description="share of the mean diagonal added to the Gram; rounding gptq")
    refine: int = Field(
        2, ge=0, le=20, description="sweeps of coordinate descent over codes and scales after GPTQ's rounding"
    )
    propagate: Literal["unquantized", "quantized"] = Field(
        "quantized", description="whose outputs the next linears are calibrated on"
    )
    correction: Correction = 0.0
    pairs: Pairs = 0

    @field_validator("pairs")
    @classmethod
    def _needs_compensation(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("rounding") == "nearest":
            raise ValueError("needs rounding: gptq; codes rounded to nearest are left as they are")
        return value

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, not self.zero_point)

    def label(self) -> str:
        balance = "+balance" if self.scales == "balanced" else ""
        return f"awq{balance}{'+gptq' if self.rounding == 'gptq' else ''} {self.grid.label()}"

    def misfit(self, out_features: int, in_features: int) -> str | None:
        return affine_misfit(self.grid, in_features)

    def predicted_bits(self, out_features: int, in_features: int) -> float:
        return affine_bits(self.grid, out_features, in_features)

    @property
    def steps(self) -> Steps:
        return Steps(
            self.grid,
            exponents=self.exponents,
            scales=self.scales,
            search_range=self.clip,
            compensate=self.rounding == "gptq",
            damp=self.damp,
            act_order=True,
            refine=self.refine,
            correction=self.correction,
            pairs=self.pairs,
        )
