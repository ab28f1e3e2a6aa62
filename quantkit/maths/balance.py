"""Scales of input channels that weigh what the weights' ranges lose against what the inputs make of it.

A weight rounded to nearest is off by up to half a step, and the steps of a group follow its largest weights. So with
columns of a weight multiplied by scales s, and its inputs divided by them, a group loses about

    (sum over rows of range(w_j s_j)^2) * (sum over its columns of x_j^2 / s_j^2).

A larger scale keeps a column's own errors small and makes the range, and so the errors of the whole group, larger.
AWQ's scales (`mean |x| ** e`, Lin et al. 2023, section 3.2) look at the second factor alone; AutoAWQ and
llm-compressor divide by a mean of the weights as well (duo scaling). Here the product is minimized, with the mean of
`|w s| ** SHARPNESS` in the place of the largest value, which a single weight would decide. The scaled weights are the
same, but for a factor a group, whatever the channels were scaled by before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.arena import empty_on, packed

SHARPNESS = 6.0
"""The power whose mean stands for a group's largest weight; from 4 to 10 the models come out the same."""

STEPS = 5
"""The first ends where rows that are alike would be balanced; the loss is within 0.2% of the least then."""

ROWS = 512
"""At most so many rows, at even distances, which tell enough of a column."""

FARTHEST = 5.0
"""The largest logarithm of a scale: a column of next to nothing must not send a norm's gain out of range."""


def balanced_scale(
    weight: Tensor, magnitude: Tensor, group_size: int | None, tie: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The scale of each input channel at which the loss above is least where all channels have weights and inputs:
    float32 [in], about 1.

    weight: float32 [out, in], the linears of one input stacked by rows. magnitude: float32 [in], of the inputs, at
    least 0. group_size: columns a group, None the whole row; what is over is a group of its own. tie: brings float32
    [in] to the same value for channels whose scale is one. Channels without weights or inputs get 1.
    """
    columns = weight.shape[1]
    group_size = min(group_size or columns, columns)
    room = (0, -columns % group_size)

    def grouped(values: Tensor) -> Tensor:
        padded = pad(values, room) if room[1] else values
        return padded.unflatten(-1, (-1, group_size))  # [..., groups, group_size]

    picked = weight[:: -(-len(weight) // ROWS)]
    sizes = empty_on(weight.device, picked.shape).copy_(picked).abs_()
    sizes = grouped(sizes).transpose(0, 1)  # [groups, rows, group_size]
    largest = sizes.amax(dim=2, keepdim=True)
    weighty = sizes.amax(dim=1) > 0  # [groups, group_size]
    # over the sizes, which are a copy; cubes are products, higher powers logarithms
    powers = sizes.div_(_or_one(largest)).square_().pow_(SHARPNESS / 2)
    turned = packed(powers.transpose(1, 2))  # a row by a matrix takes a sixth of a matrix by a column
    rows = (largest / _or_one(largest.max())).square()  # [groups, rows, 1], what a row's range counts
    inputs = grouped((magnitude / _or_one(magnitude.max())).float().square())  # [groups, group_size]
    known = weighty & (inputs > 0)
    if tie is not None:  # a head without weights has the scale of those that share it
        known = grouped(tie(known.flatten()[:columns].float())) > 0
    scale = torch.zeros_like(inputs)  # its logarithm
    for _ in range(STEPS):
        grown = (scale * SHARPNESS).exp()
        totals = (grown.unsqueeze(1) @ turned).transpose(1, 2)  # [groups, rows, 1], of |w s| ** SHARPNESS
        each = rows * _or_one(totals).pow(2 / SHARPNESS - 1)
        ranges = grown * (each.transpose(1, 2) @ powers).squeeze(1)  # what each column has of the sum of squared ranges
        errors = inputs * (-2 * scale).exp()
        # at the minimum a column's shares of both sums are the same
        have, want = errors * ranges.sum(1, keepdim=True), ranges * errors.sum(1, keepdim=True)
        if tie is not None:
            have, want = (grouped(tie(values.flatten()[:columns])) for values in (have, want))
        tiny = torch.finfo(torch.float32).tiny
        step = (have.clamp(min=tiny).log() - want.clamp(min=tiny).log()) / (SHARPNESS + 2)
        scale = torch.where(known, scale + step, 0.0)
        # channels with one scale may lie in several groups, whose means are not the same
        together = (1,) if tie is None else (0, 1)
        level = scale.sum(together, keepdim=True) / known.sum(together, keepdim=True).clamp(min=1)
        scale = torch.where(known, scale - level, 0.0).clamp(-FARTHEST, FARTHEST)
    return scale.exp().flatten()[:columns].contiguous()


def _or_one(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))
