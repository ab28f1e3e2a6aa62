"""Products of inputs in 8 bits and weights rounded to at most 4: exact, or beside float64, or not taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import device as devices
from quantkit.maths import int_kernel
from quantkit.maths.affine import quantize_nearest
from quantkit.maths.four_bit import LARGEST_BITS, FourBitWeight, four_bit_weight, run_length, shortest_run
from quantkit.tensors import BlockTensor, Grid, GroupTensor

pytestmark = pytest.mark.skipif(not devices.has_avx2(), reason="the loops are AVX2's")


def taken(weight: GroupTensor, bias: Tensor | None, inputs: Tensor) -> FourBitWeight:
    made = four_bit_weight(weight, bias, inputs)
    assert made is not None
    return made


def whole(tokens: int, rows: int, columns: int, grid: Grid) -> tuple[GroupTensor, Tensor]:
    """A weight and inputs of which every step and scale is a whole number, so that the products are."""
    draw = torch.Generator().manual_seed(tokens + rows + columns)
    groups = grid.groups(columns)
    codes = torch.randint(grid.levels, (rows, columns), dtype=torch.uint8, generator=draw)
    scale = torch.randint(-3, 4, (rows, groups), generator=draw).float()
    zero = None if grid.symmetric else torch.randint(grid.levels, (rows, groups), dtype=torch.uint8, generator=draw)
    inputs = torch.randint(-40, 41, (tokens, columns), generator=draw).float()
    inputs[:, ::32] = 127  # so that steps are 1
    return GroupTensor(codes, scale, zero, grid), inputs


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "size"),
    [(64, 16, 64, 64), (65, 1, 32, 32), (100, 33, 192, 64), (70, 50, 96, 32), (64, 7, 256, 128), (99, 40, 320, None)],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 2])
def test_whole_numbers_come_out_exactly(
    tokens: int, rows: int, columns: int, size: int | None, symmetric: bool, bits: int
) -> None:
    weight, inputs = whole(tokens, rows, columns, Grid(bits, size, symmetric))
    bias = torch.arange(rows).float()
    exact = inputs.double() @ weight.dequantize().double().T + bias
    made = taken(weight, bias, inputs)
    assert torch.equal(made(inputs).double(), exact)
    assert torch.equal(made(inputs[:1]).double(), exact[:1])
    assert torch.equal(made(inputs.view(1, tokens, columns), torch.bfloat16), exact.float().bfloat16()[None])


def layer(grid: Grid, columns: int = 256) -> tuple[GroupTensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight = quantize_nearest(torch.randn(96, columns, generator=draw) * 0.05, grid)
    return weight, torch.randn(2, 50, columns, generator=draw)


def off_by(found: Tensor, weight: GroupTensor, inputs: Tensor) -> float:
    """Root mean square of the error as a share of that of the products."""
    exact = inputs.double() @ weight.dequantize().double().T
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("grid", [Grid(4, 64, True), Grid(4, 32, False), Grid(3, 128, False), Grid(4, None, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_float64(grid: Grid, dtype: torch.dtype) -> None:
    weight, inputs = layer(grid)
    made = taken(weight, None, inputs.to(dtype))
    assert off_by(made(inputs.to(dtype)), weight, inputs.to(dtype)) < 0.007
    assert torch.equal(made(inputs, torch.bfloat16), made(inputs).bfloat16()), "rounded half to even, as torch does"


def steps_of(inputs: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Codes of inputs [tokens, in] by runs [tokens, runs, length], and their steps [tokens, runs, 1]."""
    from quantkit.maths.four_bit_kernel import round_runs

    runs = inputs.shape[1] // length
    codes = torch.empty(inputs.shape, dtype=torch.int8)
    steps, sums = torch.empty(2, len(inputs), runs).unbind()
    round_runs(len(inputs), inputs.numpy(), codes.numpy(), steps.numpy(), sums.numpy())
    by_run = codes.unflatten(1, (runs, length))
    assert torch.allclose(sums, steps * by_run.sum(2))
    return by_run, steps.unsqueeze(2)


@pytest.mark.parametrize("length", [64, 32])
def test_what_comes_to_a_lane_fits_into_it_whatever_the_inputs_are(length: int) -> None:
    from quantkit.maths.four_bit_kernel import LANE_SUM, LARGEST_CODE

    assert 2**LARGEST_BITS - 1 == LARGEST_CODE and LANE_SUM * LARGEST_CODE < 2**15
    draw = torch.Generator().manual_seed(0)
    flat = torch.ones(1, length)
    one_lane = torch.where(torch.arange(length) % 4 < 2, 1.0, 0.01)[None]
    shapes = [flat, -flat, one_lane, one_lane.flip(1), torch.randn(200, length, generator=draw)]
    shapes += [flat * scale for scale in (1e-20, 3e37)] + [torch.rand(200, length, generator=draw) ** 0.2]
    rows = torch.cat(shapes)
    codes, steps = steps_of(rows, length)
    lanes = codes.long().abs().view(len(rows), -1, 2, 2).sum((1, 3))
    assert int(lanes.max()) <= LANE_SUM
    assert bool(((codes * steps).flatten(1) - rows).abs().le(steps.flatten(1) * 0.5001).all())
    usual = slice(4, 204)
    assert torch.equal(steps[usual, 0, 0], rows[usual].abs().amax(1) / 127), (
        "no coarser than the largest value asks for"
    )
    coarsest = rows.abs().amax(1) / 127 * max(1.0, 127 * length / 2 / (LANE_SUM - length // 4) * 1.01)
    assert bool((steps[:, 0, 0] <= coarsest).all())


def test_sums_as_large_as_they_get() -> None:
    """Codes of 15 beside inputs that are all alike: without a coarser step they would not fit into 16 bits."""
    weight, inputs = layer(Grid(4, 64, False))
    weight = replace(weight, codes=torch.full_like(weight.codes, 15), scale=torch.ones_like(weight.scale))
    for sign in (1, -1):
        flat = sign * torch.ones_like(inputs)
        assert off_by(taken(weight, None, flat)(flat), weight, flat) < 0.01


def test_a_large_column_coarsens_its_neighbours_alone() -> None:
    weight, inputs = layer(Grid(4, 64, True))
    inputs[..., 7] = 1e4
    made = taken(weight, None, inputs)  # the column is most of every product
    dense = weight.dequantize().double()
    behind = inputs[..., 64:].double() @ dense[:, 64:].T
    found = made(inputs).double() - 1e4 * dense[:, 7]
    # steps of 79 leave nothing of the 63 beside it, and all of what has other steps
    assert float((found - behind).norm() / behind.norm()) < 0.01


@pytest.mark.parametrize("huge", [False, True])
def test_where_a_large_column_hides_what_counts_it_is_left_to_others(huge: bool) -> None:
    """Whatever a huge token says, whose products are most of all there is."""
    weight, inputs = layer(Grid(4, 64, True))
    codes = weight.codes.clone()
    codes[:, [7, 71, 135, 199]] = 8  # weights of 0 in the columns that are large
    weight = replace(weight, codes=codes)
    inputs[..., [7, 71, 135, 199]] *= 100
    if huge:
        inputs[0, 0] = 3000 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    assert four_bit_weight(weight, None, inputs) is None


def test_a_token_of_zeros_is_no_reason_to_leave_it() -> None:
    weight, inputs = layer(Grid(4, 64, True))
    inputs[0, ::2] = 0
    assert off_by(taken(weight, None, inputs)(inputs), weight, inputs) < 0.007
    assert taken(weight, None, inputs)(inputs[:, :0]).shape == (2, 0, 96)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_what_is_not_finite(symmetric: bool) -> None:
    weight, inputs = layer(Grid(4, 64, symmetric))
    weight = replace(weight, scale=weight.scale * torch.where(torch.arange(96) % 2 == 0, -1.0, 1.0)[:, None])
    made = taken(weight, torch.ones(96), inputs)
    inputs[0, 3] = 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        inputs[1, 7, 9] = bad
        for dtype in (torch.float32, torch.bfloat16):
            found = made(inputs, dtype)
            assert not found[1, 7].isfinite().any() and bool(found[0].isfinite().all())
            assert bool((found[0, 3] == 1).all())
    assert four_bit_weight(weight, None, inputs[1]) is None


def test_how_work_is_shared_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(Grid(4, 64, False))
    made = taken(weight, None, inputs)
    found = made(inputs)
    for tasks in (1, 3, 50):
        monkeypatch.setattr(int_kernel, "tasks_of_block", lambda *_, tasks=tasks: tasks)
        assert torch.equal(made(inputs), found)
    assert torch.equal(torch.cat([made(inputs[:1]), made(inputs[1:])]), found)


@pytest.mark.parametrize(
    ("grid", "columns", "length"),
    [
        (Grid(4, 64, True), 128, 64),
        (Grid(2, 128, False), 256, 64),
        (Grid(4, 32, True), 96, 32),
        (Grid(3, 96, True), 192, 32),
        (Grid(4, None, True), 320, 64),
        (Grid(4, None, True), 100, None),
        (Grid(4, 16, True), 64, None),
        (Grid(5, 64, True), 64, None),
        (Grid(8, 64, True), 64, None),
    ],
)
def test_which_weights_are_taken(grid: Grid, columns: int, length: int | None) -> None:
    groups = grid.groups(columns)
    weight = GroupTensor(torch.zeros(4, columns, dtype=torch.uint8), torch.ones(4, groups), None, grid)
    assert run_length(weight) == length
    assert run_length(replace(weight, group_of=torch.arange(columns, dtype=torch.int32) % groups)) is None
    other: Any = BlockTensor(torch.zeros(4, 18, dtype=torch.uint8), "Q4_0", 4, 32)
    assert run_length(other) is None


def test_the_shortest_run_of_all_counts() -> None:
    fine, coarse = Grid(4, 32, True), Grid(4, 128, True)
    assert shortest_run([coarse], [128, 256]) == 64 and shortest_run([coarse, fine], [256]) == 32
    assert shortest_run([coarse, None], [128]) is None and shortest_run([coarse], [128, 100]) is None
    assert shortest_run([], [128]) is None
