"""Aim rounded linears at what the unquantized model's would give, though their own inputs have changed meanwhile.

With X the inputs behind all that was rounded before and X' the unquantized model's, a linear should come near W X', not
W X. The weight whose output on X is nearest to W X' is W + W D H^-1, with D = (X' - X)^T X and H = X^T X; rounding goes
on from there. A share of it is taken, since D is of the calibration text alone. Source: Li et al. 2025, GPTAQ:
Efficient Finetuning-Free Quantization for Asymmetric Calibration, section 3, of which this is the part that moves the
weights before they are rounded.

Where the output is added to hidden states that have changed as well, from R' to R, the sum should come near W X' + R':
that is W + (W D + E) H^-1, with E = (R' - R)^T X. docs/quality.md has what it is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.maths.refine import damped

FAR = 16.0
"""How many times the median of its batch a token's squared length may be, or the square of its change: the few tokens
beyond, whose activations are hundreds of times as large, would decide the correction for all the others."""


class CorrectionAccumulator:
    """Sums D = (X' - X)^T X, and E where there are states, over the tokens that are not far out, and X^T X over those
    that are.

    scale: float32 [in], what is divided out of the inputs X already and has still to be out of X', None where nothing
    is. dtype: what the products are computed in; sums are float32.
    """

    def __init__(self, in_features: int, device: torch.device, dtype: torch.dtype, scale: Tensor | None):
        self.change = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.far_gram = torch.zeros_like(self.change)
        self.states_change: Tensor | None = None  # E, [out, in]
        self._dtype, self._scale = dtype, scale

    def add(self, unquantized: Tensor, inputs: Tensor, states_change: Tensor | None = None) -> None:
        """A batch of tokens on both ways: [..., in] each, any float dtype. states_change: [..., out], how far the
        unquantized model's hidden states are from those that the output is added to; in every batch or in none."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        change = unquantized.detach().reshape(rows.shape).float()
        change = change - rows if self._scale is None else change / self._scale - rows
        apart = rows[:, :0] if states_change is None else states_change.detach().reshape(len(rows), -1).float()
        far = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for values in (rows, change, apart):
            length = values.square().sum(dim=1)
            far |= length > FAR * length.median()
        if bool(far.any()):
            self.far_gram.addmm_(rows[far].T, rows[far])
            rows, change, apart = rows[~far], change[~far], apart[~far]
        rows = rows.to(self._dtype)
        self.change += change.to(self._dtype).T @ rows
        if states_change is not None:
            moved = apart.to(self._dtype).T @ rows
            self.states_change = moved.float() if self.states_change is None else self.states_change + moved

    def corrected(self, weight: Tensor, gram: Tensor, damp: float, share: float) -> Tensor:
        """The weight to round, float32 [out, in].

        weight: float32 [out, in]. gram: float32 [in, in] of all inputs X. damp: share of the mean diagonal added to it.
        share: of the correction that is taken.
        """
        near = damped(gram - self.far_gram, damp).double()
        missed = weight @ self.change  # [out, in]
        if self.states_change is not None:
            missed += self.states_change
        moved = torch.cholesky_solve(missed.double().T, torch.linalg.cholesky(near)).T.float()
        return weight + share * moved
