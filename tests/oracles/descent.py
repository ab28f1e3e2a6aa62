"""Coordinate descent and scale fit written plainly in float64, a code at a time."""

from __future__ import annotations

import numpy as np


def sweep(weight, codes, scale, zero, gram, group_size, levels):
    """Codes [out, in] and scales [out, groups] after one sweep: each code in column order moved to its best value given
    all else, and after each group its scale moved to the float16 nearest its best value where that helps."""
    codes = np.array(codes, dtype=np.float64)
    scale = np.array(scale, dtype=np.float64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            losses = []
            for candidate in range(levels):
                trial = codes[i].copy()
                trial[j] = candidate
                losses.append(row_loss(weight[i], trial, scale[i], zero[i], gram, group_size))
            codes[i, j] = int(np.argmin(losses))
            if (j + 1) % group_size == 0:
                g = j // group_size
                trial = scale[i].copy()
                trial[g] = np.float16(best_scale(weight[i], codes[i], scale[i], zero[i], gram, group_size, g))
                before = row_loss(weight[i], codes[i], scale[i], zero[i], gram, group_size)
                inside = 0.5 * scale[i, g] < trial[g] < 2 * scale[i, g]
                if inside and row_loss(weight[i], codes[i], trial, zero[i], gram, group_size) < before:
                    scale[i] = trial
    return codes.astype(np.uint8), scale.astype(np.float32)


def row_loss(weight, codes, scale, zero, gram, group_size):
    """(q - w) H (q - w)^T of one row."""
    group = np.arange(len(weight)) // group_size
    error = (codes - zero[group]) * scale[group] - weight
    return float(error @ gram @ error)


def best_scale(weight, codes, scale, zero, gram, group_size, g):
    """The scale of group g with the least loss, all else held: the lowest point of a parabola through three losses."""
    losses = []
    for step in (0.0, 1.0, 2.0):
        trial = scale.copy()
        trial[g] = step
        losses.append(row_loss(weight, codes, trial, zero, gram, group_size))
    square = (losses[0] - 2 * losses[1] + losses[2]) / 2
    return (square + losses[0] - losses[1]) / (2 * square) if square > 0 else scale[g]
