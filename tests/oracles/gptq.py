"""GPTQ written plainly in float64: one weight row and one column at a time, the inverse Hessian updated by elimination.

Slow on purpose. It shares no code and no factorization with the product: after each column the inverse of the remaining
Hessian is found by the rank-one downdate of Optimal Brain Surgeon, where the product reads it off one Cholesky factor.
"""

from __future__ import annotations

import numpy as np


def gptq(weight, scale, zero, gram, group_size, levels, damp, act_order, values=None):
    """Codes [out, in] (uint8) for weight [out, in], scale and zero [out, groups], gram [in, in].

    values: [levels], of the codes where they are not evenly spaced; zero is then left out of account."""
    weight = np.array(weight, dtype=np.float64)
    hessian = np.array(gram, dtype=np.float64)
    rows, columns = weight.shape
    diagonal = np.diag(hessian).copy()
    live = diagonal > 0
    mean = diagonal[live].mean()
    for j in range(columns):
        if not live[j]:
            hessian[j, j] = mean
    hessian = hessian + np.eye(columns) * damp * mean
    order = sorted(range(columns), key=lambda j: (-diagonal[j], j)) if act_order else list(range(columns))
    inverse = np.linalg.inv(hessian)
    codes = np.zeros((rows, columns), dtype=np.uint8)
    remaining = list(order)
    while remaining:
        j = remaining[0]
        group = j // group_size
        for i in range(rows):
            if values is None:
                code = np.clip(np.round(weight[i, j] / scale[i, group] + zero[i, group]), 0, levels - 1)
                value = code - zero[i, group]
            else:
                code = np.argmin(np.abs(weight[i, j] / scale[i, group] - values))
                value = values[code]
            codes[i, j] = code
            error = weight[i, j] - value * scale[i, group]
            for k in remaining[1:]:
                weight[i, k] -= error * inverse[j, k] / inverse[j, j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
        remaining = remaining[1:]
    return codes
