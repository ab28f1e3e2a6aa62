"""Coordinate descent and scale fit written plainly in float64, a code at a time."""

from __future__ import annotations

import numpy as np


def sweep(weight, codes, scale, zero, gram, group_size, levels):
    """Codes [out, in] after each was moved once, in column order, to its best value given all others."""
    codes = np.array(codes, dtype=np.float64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            best, best_loss = None, np.inf
            for candidate in range(levels):
                trial = codes[i].copy()
                trial[j] = candidate
                loss = row_loss(weight[i], trial, scale[i], zero[i], gram, group_size)
                if loss < best_loss:
                    best, best_loss = candidate, loss
            codes[i, j] = best
    return codes.astype(np.uint8)


def row_loss(weight, codes, scale, zero, gram, group_size):
    """(q - w) H (q - w)^T of one row."""
    group = np.arange(len(weight)) // group_size
    error = (codes - zero[group]) * scale[group] - weight
    return float(error @ gram @ error)


def fitted_scale(weight, codes, zero, gram, group_size):
    """Least-squares scales [groups] of one row: columns of the design are the groups' codes through a root of H."""
    group = np.arange(len(weight)) // group_size
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    design = np.stack([root @ np.where(group == g, codes - zero[group], 0.0) for g in range(len(zero))], axis=1)
    return np.linalg.lstsq(design, root @ weight, rcond=None)[0]
