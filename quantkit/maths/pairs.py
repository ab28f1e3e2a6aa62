"""Two codes at once: what descent over single codes cannot find, since either move alone would cost something.

Columns that carry the same signal make up for each other, so that one code up and another one down may lose less than
both where they are. At a minimum of the single moves a column's cheaper one costs `c_j - |s_j g_j|`; behind it the
gradient is `g + d H_j`, and the move that then gains most is the partner. This is the exchange of pairs of local search
for integer least squares, on the loss of `maths/refine.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.arena import empty, empty_on
from quantkit.maths.products import times_transposed

LEAST_GAIN = 1e-3
"""What a pair has to gain, as a share of what the first move adds by its curvature: far above what float32 rounds."""

DEAREST = 0.5
"""What the first move of a pair may cost, as a share of the same: dearer ones find hardly a partner, and leaving them
out takes half of the time and next to nothing of the gain (docs/quality.md)."""

ROW_BAND = 1024
"""Rows that are looked at together: what is held of them beside codes and error stays within tens of megabytes."""


def move_pairs(codes: Tensor, scale: Tensor, error: Tensor, gram: Tensor, levels: int) -> None:
    """Better codes uint8 [out, in], each column visited once; codes and error are updated.

    scale: float32 [out, groups]. error: float32 [out, in], what the codes stand for less the weight. gram: float32
    [in, in], already damped.
    """
    size = codes.shape[1] // scale.shape[1]
    bands = (tensor.split(ROW_BAND) for tensor in (codes, scale, error))
    for own_codes, own_scale, own_error in zip(*bands, strict=True):
        before, now, steps = (empty_on(codes.device, own_codes.shape) for _ in range(3))
        before.copy_(own_codes)
        steps.view(len(steps), -1, size).copy_(own_scale.unsqueeze(2))
        _sweep_pairs(own_codes, steps, times_transposed(own_error, gram.T), gram, levels)
        own_error += now.copy_(own_codes).sub_(before).mul_(steps)


def _sweep_pairs(codes: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, levels: int) -> None:
    """steps: float32 [out, in], what a code more adds to a weight. Codes are updated, gradient is used up."""
    if codes.device.type != "cpu":
        _sweep_pairs_tensors(codes, steps, gradient, gram, levels)
        return
    from quantkit.maths.pair_kernel import sweep_pairs

    curves = torch.square(steps, out=empty(steps.shape)).mul_(0.5).mul_(gram.diagonal())
    slopes, matrix = gradient.numpy(), gram.contiguous().numpy()
    sweep_pairs(len(codes), codes.numpy(), steps.numpy(), curves.numpy(), slopes, matrix, levels, LEAST_GAIN, DEAREST)


def _sweep_pairs_tensors(codes: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, levels: int) -> None:
    """The same for any device, a few tensor operations a column; codes and gradient are updated."""
    curves = 0.5 * steps.square() * gram.diagonal()
    for j in range(codes.shape[1]):
        slope = steps[:, j] * gradient[:, j]
        first = torch.where(slope > 0, -1, 1)
        code = codes[:, j].int() + first
        moved = (first * steps[:, j]).unsqueeze(1)
        slopes = steps * (gradient + moved * gram[j])  # [out, in], behind the first move
        partner = torch.where(slopes > 0, -1, 1)
        landed = codes.int() + partner
        gains = (slopes.abs() - curves).masked_fill((landed < 0) | (landed >= levels), -torch.inf)
        gains[:, j] = -torch.inf
        most, at = gains.max(dim=1)
        least = curves[:, j] - slope.abs() + LEAST_GAIN * curves[:, j]
        worth_it = (most > least) & (least <= DEAREST * curves[:, j])
        rows = ((code >= 0) & (code < levels) & worth_it).nonzero().flatten()
        at = at[rows]
        codes[rows, j], codes[rows, at] = code[rows].to(torch.uint8), landed[rows, at].to(torch.uint8)
        second = (partner[rows, at] * steps[rows, at]).unsqueeze(1)
        gradient[rows] += moved[rows] * gram[j] + second * gram[at]
