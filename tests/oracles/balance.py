"""The loss that balanced scales are to make least, and its minimum by a general solver, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def losses(scale: Tensor, weight: Tensor, magnitude: Tensor, group_size: int, sharpness: float) -> Tensor:
    """Of each group, whole ones only: [groups]."""
    sizes = (weight.double().abs() * scale).unflatten(1, (-1, group_size))
    ranges = sizes.pow(sharpness).mean(dim=2).pow(2 / sharpness).sum(dim=0)
    errors = (magnitude.double() / scale).square().unflatten(0, (-1, group_size)).sum(dim=1)
    return ranges * errors


def least(weight: Tensor, magnitude: Tensor, group_size: int, sharpness: float, repeats: int = 1) -> Tensor:
    """Scales of least loss over all groups together: [in]; the first of `repeats` equal parts stands for all."""
    free = torch.zeros(weight.shape[1] // repeats, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [free],
        max_iter=1000,
        history_size=40,
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        each = losses(free.exp().repeat(repeats), weight, magnitude, group_size, sharpness)
        loss = each.log().sum() if repeats == 1 else each.sum().log()  # groups that share scales are weighed
        loss.backward()
        return loss

    solver.step(closure)
    return free.detach().exp().repeat(repeats)
