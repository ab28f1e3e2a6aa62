"""Round to nearest: no calibration, the baseline that every calibrated method has to beat."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit.maths.affine import quantize_nearest
from quantkit.maths.gram import InputStatistics
from quantkit.methods.base import (
    BlockResult,
    BlockWeights,
    Method,
    affine_bits,
    affine_misfit,
    check_finite,
    check_range,
    notes_of,
)
from quantkit.tensors import Grid, GroupTensor, row_bands


class RTN(Method):
    """Every weight goes to the nearest point of its group's grid."""

    name: Literal["rtn"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(128, ge=8, description="input columns a scale; null is the whole row")
    symmetric: bool = False

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def label(self) -> str:
        return f"rtn {self.grid.label()}"

    def misfit(self, out_features: int, in_features: int) -> str | None:
        return affine_misfit(self.grid, in_features)

    def predicted_bits(self, out_features: int, in_features: int) -> float:
        return affine_bits(self.grid, out_features, in_features)

    def quantize_block(self, given: BlockWeights, statistics: dict[str, InputStatistics]) -> BlockResult:
        quantized = {name: self._round(name, weight) for name, weight in given.weights.items()}
        return BlockResult(quantized, dict.fromkeys(quantized, self.label()), notes=notes_of(quantized))

    def _round(self, name: str, weight: Tensor) -> GroupTensor:
        """weight: [out, in]. Raises ModelError naming it when it is not finite or too large."""
        check_finite(f"{name}.weight", weight)
        check_range(f"{name}.weight", weight, self.grid)
        bands = [quantize_nearest(weight[rows].float(), self.grid) for rows in row_bands(weight)]
        zeros = [band.zero for band in bands if band.zero is not None]
        return GroupTensor(
            codes=torch.cat([band.codes for band in bands]),
            scale=torch.cat([band.scale for band in bands]),
            zero=torch.cat(zeros) if zeros else None,
            grid=self.grid,
        )
