"""Products of inputs and weights in 8-bit integers, nearly twice as fast as in what else the processor is fastest at.

Columns are balanced first, as in SmoothQuant: what a column of the inputs is divided by, the same column of the weight
is multiplied with, so that a few large columns do not leave the others with few steps. Source: Xiao et al. 2023,
section 4, with root mean squares in the place of the largest values, which follow a single token. Then each token and
each row of the weight has steps of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.arena import converted, empty
from quantkit.maths.compiled import readable
from quantkit.maths.gram import ColumnSums, totals
from quantkit.maths.int_products import RightFactor, right_factor
from quantkit.maths.products import SMALL_BAND_VALUES, product_bands, times_transposed

TRIED = 64
"""Tokens whose products are compared with those in float32."""

BAND_ROWS = 128
"""Of a weight, that are multiplied at once for that at least: two tiles of the loops that do it."""

LARGEST_ERROR = 0.05
"""What the products may be off by, as a share of their root mean square: below what rounding to 4 bits does to them.
Inputs and weights of trained models give 0.005 to 0.025."""


@dataclass(frozen=True)
class Balance:
    """What columns of weights are multiplied with, and of their inputs, divided by: float32 [in]. factors: the
    reciprocals."""

    divisors: Tensor
    factors: Tensor


@dataclass(frozen=True)
class EightBitInputs:
    """Inputs of linears in 8 bits. codes: int8 [tokens, in]. steps: float32 [tokens]. shape: of the inputs."""

    codes: Tensor
    steps: Tensor
    shape: torch.Size


@dataclass(frozen=True)
class EightBitWeight:
    """A linear's weight in 8 bits. codes: of [out, in], balanced. steps: float32 [out]. factors: float32 [in], what
    inputs are multiplied with. bias: float32 [out]."""

    codes: RightFactor
    steps: Tensor
    factors: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`inputs @ weight.T + bias` for inputs [..., in]: [..., out], both float32 or bfloat16, on the CPU."""
        return self.products(self.coded(inputs), dtype)

    def coded(self, inputs: Tensor) -> EightBitInputs:
        """Inputs [..., in] as they are multiplied by this weight, and by others with the same factors."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        return EightBitInputs(*_rounded(rows, self.factors), inputs.shape)

    def products(self, inputs: EightBitInputs, dtype: torch.dtype = torch.float32) -> Tensor:
        """The outputs for inputs in codes."""
        outputs = self.codes.scaled_products(inputs.codes, inputs.steps, self.steps, self.bias, dtype)
        return outputs.view(*inputs.shape[:-1], len(self.bias))

    def writes_over(self, gates: Tensor) -> bool:
        """Whether `write_gated` is for such gates here."""
        known = gates.dtype in (torch.float32, torch.bfloat16) and gates.is_contiguous()
        return known and self.codes.way.gates

    def write_gated(self, inputs: EightBitInputs, gates: Tensor) -> None:
        """Write the outputs in the dtype of gates [..., out], float32 or bfloat16 in one piece, times SiLU of these
        over them; only where `writes_over` says so."""
        rows = gates.detach().view(-1, len(self.bias))
        self.codes.write_gated(inputs.codes, inputs.steps, self.steps, self.bias, rows)


def balance(weights: Sequence[Tensor], inputs: Tensor) -> Balance:
    """The balance of weights [out, in], each of which counts for as much, and of inputs like these, [..., in]."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    shares = [_mean_squares(weight.detach()) for weight in weights]
    if len(shares) > 1:
        shares = [share / share.mean() for share in shares]
    ratio = _mean_squares(rows) / sum(shares[1:], start=shares[0])
    usable = ratio.isfinite() & (ratio > 0)
    divisors = torch.where(usable, ratio, torch.ones_like(ratio)).pow_(0.25)
    return Balance(divisors, 1 / divisors)


def eight_bit_weight(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, balanced: Balance | None = None
) -> EightBitWeight | None:
    """A weight [out, in] for products with inputs like these, [..., in]; None where some of them come out too far from
    those in float32. balanced: how they are balanced, by this weight alone unless told."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    balanced = balance([weight], rows) if balanced is None else balanced
    codes, steps = _rounded(weight.detach(), balanced.divisors)
    offset = torch.zeros(len(weight)) if bias is None else bias.detach().float()
    made = EightBitWeight(right_factor(codes), steps, balanced.factors, offset)
    tried = rows[:: max(1, len(rows) // TRIED)][:TRIED].float()
    exact = empty((len(tried), len(weight)))
    for band in product_bands(weight, max(SMALL_BAND_VALUES // 4, BAND_ROWS * weight.shape[1])):
        exact[:, band] = times_transposed(tried, converted(weight[band].detach(), weight.device, torch.float32))
    error = (made(tried) - offset - exact).square().mean()
    return made if bool(error <= LARGEST_ERROR**2 * exact.square().mean()) else None


def _rounded(rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of rows [n, columns] times factors float32 [columns], and the step of each row, float32 [n]."""
    from quantkit.maths.eight_bit_kernels import round_tokens

    codes, steps = empty(rows.shape, torch.int8), torch.empty(len(rows))
    round_tokens(len(rows), readable(rows), factors.numpy(), codes.numpy(), steps.numpy())
    return codes, steps


def _mean_squares(rows: Tensor) -> Tensor:
    """Of each column of rows [n, columns]: float32 [columns]."""
    return totals([ColumnSums(readable(rows))])[1] / len(rows)
