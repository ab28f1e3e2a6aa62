"""GPTQ (Frantar et al. 2022): round column by column, each error made up for by the columns still to come.

Groups are static (their scales come from the unrounded weight), so act-order costs the file no g_idx permutation.
Beyond the paper, scales are folded in first as for AWQ, each group's range is searched, and codes and scales are
refined in turn after rounding (maths/refine.py); docs/quality.md has what each is worth. The paper's method is
`exponents: 0, search_range: false, refine: 0`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantkit.methods.base import Scales, affine_bits, affine_misfit
from quantkit.methods.calibrated import CalibratedMethod, Correction, Pairs, Steps
from quantkit.tensors import Grid


class GPTQ(CalibratedMethod):
    """Settings of GPTQ; the seed settings of the field are 4 bits, group 128, act-order."""

    name: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(128, ge=8, description="input columns a scale; null is the whole row")
    symmetric: bool = Field(True, description="vLLM takes symmetric files only")
    act_order: bool = Field(True, description="round the columns with the largest inputs first")
    damp: float = Field(0.01, gt=0, lt=1, description="share of the mean diagonal added to the Gram")
    exponents: int = Field(
        4, ge=0, le=200, description="steps of the search for scales, folded in before rounding; 0 leaves scales out"
    )
    scales: Scales = "balanced"
    search_range: bool = Field(True, description="search each group's range for the one that loses least")
    refine: int = Field(
        2, ge=0, le=20, description="sweeps of coordinate descent over codes and scales after GPTQ's rounding"
    )
    propagate: Literal["unquantized", "quantized"] = Field(
        "quantized", description="whose outputs the next linears are calibrated on"
    )
    correction: Correction = 0.0
    pairs: Pairs = 0

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def label(self) -> str:
        scales = {"balanced": "+scales", "inputs": "+awq"}[self.scales] if self.exponents else ""
        return f"gptq{scales} {self.grid.label()}{' act-order' if self.act_order else ''}"

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
            search_range=self.search_range,
            compensate=True,
            damp=self.damp,
            act_order=self.act_order,
            refine=self.refine,
            correction=self.correction,
            pairs=self.pairs,
        )
