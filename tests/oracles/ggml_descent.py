"""Descent over codes, scales and minima of ggml's blocks written plainly in float64: every candidate's loss in full."""

from __future__ import annotations

import numpy as np


def sweep(weight, codes, step, base, units, levels, values, affine, gram, size):
    """One row after one sweep: codes [in], step and base [groups] of `step * values[code] - base`.

    units: [2, groups], of scale and minimum, whose levels lie in levels[0] ... levels[1] and 0 ... levels[1]; levels
    None: both are float16 numbers."""
    codes, step, base = codes.copy(), step.astype(np.float64), base.astype(np.float64)
    group = np.arange(len(weight)) // size

    def loss(codes, step, base):
        error = step[group] * values[codes] - base[group] - weight
        return error @ gram @ error

    def stored(number, unit, least):
        if levels is None:
            return float(np.float16(number))
        return float(np.float32(np.clip(np.round(number / unit), least, levels[1]) * unit))

    for g in range(len(step)):
        if step[g] == 0:
            continue
        for j in np.flatnonzero(group == g):
            trials = []
            for candidate in range(len(values)):
                trial = codes.copy()
                trial[j] = candidate
                trials.append(loss(trial, step, base))
            codes[j] = int(np.argmin(trials))
        before = loss(codes, step, base)
        moves = affine and (levels is None or units[1, g] != 0)
        error = step[group] * values[codes] - base[group] - weight
        wanted = _best_change(error, np.where(group == g, values[codes], 0.0), group == g if moves else None, gram)
        new = stored(step[g] + wanted, units[0, g], levels[0] if levels else 0)
        new = new if 0.5 < new / step[g] < 2 else step[g]
        trial_step, trial_base = step.copy(), base.copy()
        trial_step[g] = new
        if moves:
            moved = trial_step[group] * values[codes] - base[group] - weight
            inside = (group == g).astype(float)
            trial_base[g] = stored(base[g] + (inside @ gram @ moved) / (inside @ gram @ inside), units[1, g], 0)
        if loss(codes, trial_step, trial_base) < before:
            step, base = trial_step, trial_base
    return codes, step, base


def _best_change(error, direction, inside, gram):
    """What the scale should change by, the minimum being free to follow where `inside` is given."""
    root = np.linalg.cholesky(gram).T
    sides = [direction] if inside is None else [direction, -inside.astype(float)]
    return float(np.linalg.lstsq(root @ np.stack(sides, axis=1), -root @ error, rcond=None)[0][0])
