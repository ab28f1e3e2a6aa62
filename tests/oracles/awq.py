"""AWQ's scale and clip searches written plainly in float64, scored on the activations themselves, not on their Gram
matrix."""

from __future__ import annotations

import numpy as np


def rounded(weight, group_size, levels, symmetric, share=1.0):
    """Nearest grid points of weight [out, in] on ranges shrunk to `share`, scales rounded to float16."""
    result = np.zeros_like(weight)
    rows, columns = weight.shape
    for i in range(rows):
        for start in range(0, columns, group_size):
            group = weight[i, start : start + group_size]
            low, high = min(group.min(), 0.0), max(group.max(), 0.0)
            if symmetric:
                high = max(-low, high)
                low = -high
            low, high = low * share, high * share
            step = float(np.float16((high - low) / (levels - 1))) if high > low else 1.0
            zero = levels // 2 if symmetric else np.clip(np.round(-low / step), 0, levels - 1)
            codes = np.clip(np.round(group / step + zero), 0, levels - 1)
            result[i, start : start + group_size] = (codes - zero) * step
    return result


def best_scale(weight, inputs, group_size, levels, symmetric, exponents):
    """(scale [in], exponent, losses): the candidate whose rounded layer's outputs on `inputs` [tokens, in] are
    nearest."""
    weight, inputs = np.array(weight, np.float64), np.array(inputs, np.float64)
    magnitude = np.maximum(np.abs(inputs).mean(axis=0), 1e-4)
    losses = []
    for step in range(exponents):
        scale = magnitude ** (step / exponents)
        scale = scale / np.sqrt(scale.max() * scale.min())
        approximation = rounded(weight * scale, group_size, levels, symmetric) / scale
        losses.append(float((((approximation - weight) @ inputs.T) ** 2).sum()))
    best = int(np.argmin(losses))
    scale = magnitude ** (best / exponents)
    return scale / np.sqrt(scale.max() * scale.min()), best / exponents, losses


def range_losses(weight, inputs, group_size, levels, symmetric, shares):
    """Loss of each group for each share: [shares, out, groups], on that group's own inputs."""
    weight, inputs = np.array(weight, np.float64), np.array(inputs, np.float64)
    losses = []
    for share in shares:
        error = rounded(weight, group_size, levels, symmetric, share) - weight
        per_group = []
        for start in range(0, weight.shape[1], group_size):
            part = slice(start, start + group_size)
            per_group.append(((error[:, part] @ inputs[:, part].T) ** 2).sum(axis=1))
        losses.append(np.stack(per_group, axis=1))
    return np.stack(losses)
