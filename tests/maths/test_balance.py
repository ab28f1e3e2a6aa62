from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from oracles import balance as oracle
from quantkit.maths.balance import FARTHEST, SHARPNESS, balanced_scale
from quantkit.maths.fold import mean_over_heads


def case(rows: int = 96, columns: int = 64) -> tuple[Tensor, Tensor]:
    """Weights and magnitudes of inputs, both very different from channel to channel."""
    generator = torch.Generator().manual_seed(rows)
    spread = torch.exp(torch.randn(columns, generator=generator))
    weight = torch.randn(rows, columns, generator=generator) * spread
    return weight, torch.exp(2 * torch.randn(columns, generator=generator))


@pytest.mark.parametrize("group_size", [16, 64, None])
def test_the_loss_is_that_of_a_solver_in_float64(group_size: int | None) -> None:
    weight, magnitude = case()
    group = group_size or 64
    found = oracle.losses(balanced_scale(weight, magnitude, group_size).double(), weight, magnitude, group, SHARPNESS)
    least = oracle.losses(oracle.least(weight, magnitude, group, SHARPNESS), weight, magnitude, group, SHARPNESS)
    before = oracle.losses(torch.ones(64).double(), weight, magnitude, group, SHARPNESS)
    assert torch.allclose(found, least, rtol=2e-3)
    assert (least < 0.5 * before).all(), "the case must be one where scales pay"


def test_heads_that_share_a_scale_get_the_best_one_for_all() -> None:
    weight, magnitude = case()

    def tie(values: Tensor) -> Tensor:
        return values.view(4, 16).mean(dim=0).repeat(4)

    scale = balanced_scale(weight, magnitude, 16, tie)
    assert torch.equal(scale[:16].repeat(4), scale)
    best = oracle.least(weight, magnitude, 16, SHARPNESS, repeats=4)
    found, least = (float(oracle.losses(s, weight, magnitude, 16, SHARPNESS).sum()) for s in (scale.double(), best))
    assert found == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("group_size", [8, 16, 24, 48, None])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_shared_scale_is_the_same_in_every_head_however_groups_lie(group_size: int | None, pruned: bool) -> None:
    weight, magnitude = case(columns=48)  # two value heads of 8, three query heads each
    tie = partial(mean_over_heads, head_dim=8, repeats=3)
    if pruned:
        weight[:, :8] = 0
    scale = balanced_scale(weight, tie(magnitude), group_size, tie)
    heads = scale.view(2, 3, 8)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert not torch.equal(heads[0], torch.ones(3, 8))


def test_what_channels_were_scaled_by_before_changes_nothing() -> None:
    weight, magnitude = case()
    before = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(5)))
    plain, moved = balanced_scale(weight, magnitude, 16), balanced_scale(weight * before, magnitude / before, 16)
    both = (plain.view(4, 16), (moved * before).view(4, 16))
    assert torch.allclose(*(s / s.log().mean(dim=1, keepdim=True).exp() for s in both), rtol=1e-2)


def test_a_huge_weight_alone_does_not_decide() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, magnitude = torch.randn(512, 32, generator=generator), torch.ones(32)
    before = balanced_scale(weight, magnitude, 16)
    weight[7, 3] = 20 * float(weight.abs().mean())
    assert torch.allclose(balanced_scale(weight, magnitude, 16), before, rtol=0.2)


@pytest.mark.parametrize("group_size", [16, 24])
def test_channels_without_weights_or_inputs_and_rows_of_zeros(group_size: int) -> None:
    weight, magnitude = case()
    weight[:, 5], magnitude[9], weight[11] = 0, 0, 0
    weight[:, 48:] = 0
    scale = balanced_scale(weight, magnitude, group_size)
    assert torch.isfinite(scale).all()
    assert scale[5] == scale[9] == 1
    assert (scale[48:] == 1).all()
    tiny = balanced_scale(weight * 1e-20, magnitude * 1e-15, group_size)
    assert torch.allclose(tiny, scale, rtol=1e-3)


def test_scales_keep_within_reach() -> None:
    weight, magnitude = case()
    magnitude[2] = 1e20
    scale = balanced_scale(weight, magnitude, 16)
    assert float(scale.log().abs().max()) <= FARTHEST + 1e-6
