"""What AWQ and GPTQ share: fold scales into what stands before, choose each group's grid, round.

The two methods differ in their defaults and in the file they are written for, not in their steps, so each is a choice
of `Steps`: scales or none, a searched or a full range, rounding to nearest or with error compensation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths import fold
from quantkit.maths.affine import full_range, grid_for_range, nearest_codes, search_grid
from quantkit.maths.compensate import inverse_factor, round_compensated
from quantkit.maths.gram import InputStatistics
from quantkit.maths.refine import damped, refine
from quantkit.methods.base import BlockResult, BlockWeights, require_finite
from quantkit.model.blocks import LinearGroup
from quantkit.tensors import Grid, GroupTensor


@dataclass(frozen=True)
class Steps:
    """How a calibrated method treats the linears of one input.

    exponents: candidates of AWQ's scale search; 0 leaves the scales out. search_range: look for the best share of each
    group's range. compensate: GPTQ's rounding, else to nearest. damp, act_order: of GPTQ's rounding. refine: rounds
    of descent and scale refit after it.
    """

    grid: Grid
    exponents: int
    search_range: bool
    compensate: bool
    damp: float
    act_order: bool
    refine: int = 0


class _Working:
    """The tensors of a block while scales are folded through them: float32 copies, made when first touched."""

    def __init__(self, given: BlockWeights):
        self.given = given
        self.weights: dict[str, Tensor] = {name: given.finite(name) for name in given.weights}
        self.replaced: dict[str, Tensor] = {}
        self.folded: set[str] = set()

    def other(self, name: str) -> Tensor | None:
        """An unquantized tensor of the block as it stands now."""
        if name in self.replaced:
            return self.replaced[name]
        found = self.given.others.get(name)
        return None if found is None else require_finite(name, found)


def quantize_calibrated(given: BlockWeights, statistics: Mapping[str, InputStatistics], steps: Steps) -> BlockResult:
    """Quantize the linears of a block; see `Method.quantize_block`."""
    working = _Working(given)
    for name, seen in statistics.items():
        if name in given.weights:
            require_finite(f"inputs of {name}", seen.gram)
    input_scale: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    marks: dict[str, list[str]] = {name: [] for name in given.weights}
    # Linears that feed other linears of the block are rescaled before their own inputs are looked at.
    groups = sorted(given.block.groups, key=lambda group: group.producer_kind == "norm")
    if steps.exponents:
        for group in groups:
            _fold_group(working, group, statistics, steps, input_scale, notes, marks)
    quantized: dict[str, GroupTensor] = {}
    for group in given.block.groups:
        linears = [name for name in group.linears if name in given.weights]
        if not linears:
            continue
        seen = statistics[linears[0]]
        gram = seen.gram
        if linears[0] in input_scale:
            scale = input_scale[linears[0]]
            gram = gram / scale[:, None] / scale[None, :]
        _round_group(working, linears, gram, steps, quantized, notes, marks)
    applied = {name: " ".join([steps_label(steps), *marks[name]]) for name in quantized}
    changed = working.folded | set(input_scale)
    return BlockResult(
        quantized=quantized,
        applied=applied,
        replaced=working.replaced,
        notes=notes,
        reference={name: working.weights[name] for name in changed if name in quantized},
    )


def steps_label(steps: Steps) -> str:
    """What rounds and how, such as "gptq 4-bit g64 asym"."""
    return f"{'gptq' if steps.compensate else 'nearest'} {steps.grid.label()}"


def _fold_group(
    working: _Working,
    group: LinearGroup,
    statistics: Mapping[str, InputStatistics],
    steps: Steps,
    input_scale: dict[str, Tensor],
    notes: dict[str, str],
    marks: dict[str, list[str]],
) -> None:
    """Find the scale of one shared input and move it from the linears that read it to what produces it."""
    ours = [name for name in group.linears if name in working.weights]
    if not ours or group.producer is None:
        return
    if len(ours) < len(group.linears):
        others = sorted(set(group.linears) - set(ours))
        notes.update(dict.fromkeys(ours, f"no scale: {', '.join(others)} read the same input under other settings"))
        return
    is_norm = group.producer_kind == "norm"
    if is_norm and working.other(f"{group.producer}.weight") is None:
        notes.update(dict.fromkeys(ours, f"no scale: {group.producer}.weight is not stored"))
        return
    if not is_norm and group.producer not in working.weights:
        notes.update(dict.fromkeys(ours, f"no scale: {group.producer} is not quantized by this method"))
        return
    seen = statistics[ours[0]]
    stacked = torch.cat([working.weights[name] for name in ours])  # [sum of out, in]
    channels = repeats = 0
    mean_abs = seen.mean_abs
    if group.producer_kind == "value":
        assert working.given.head_dim is not None
        channels = working.weights[group.producer].shape[0]
        repeats = stacked.shape[1] // channels
        tied = fold.tie_over_heads(mean_abs, working.given.head_dim, repeats, "mean")
        mean_abs = fold.spread_over_heads(tied, working.given.head_dim, repeats)
    scale, exponent = fold.search_scale(stacked, mean_abs, seen.gram, steps.grid, steps.exponents)
    for name in ours:
        marks[name].append(f"scale^{exponent:g}")
    if exponent == 0.0:
        return
    for name in ours:
        working.weights[name] = working.weights[name] * scale
        input_scale[name] = scale
    divisor = scale
    if group.producer_kind == "value":
        assert working.given.head_dim is not None
        divisor = fold.tie_over_heads(scale, working.given.head_dim, repeats, "first")
    _divide_producer(working, group, divisor)


def _divide_producer(working: _Working, group: LinearGroup, scale: Tensor) -> None:
    """Divide the output channels of what feeds a group by its scale."""
    bias_name = f"{group.producer}.bias"
    bias = working.other(bias_name)
    if bias is not None:
        working.replaced[bias_name] = bias / scale
    if group.producer_kind == "norm":
        name = f"{group.producer}.weight"
        gain = working.other(name)
        assert gain is not None
        offset = working.given.norm_offset
        working.replaced[name] = (gain + offset) / scale - offset
        return
    assert group.producer is not None
    working.weights[group.producer] = working.weights[group.producer] / scale[:, None]
    working.folded.add(group.producer)


def _round_group(
    working: _Working,
    linears: list[str],
    gram: Tensor,
    steps: Steps,
    quantized: dict[str, GroupTensor],
    notes: dict[str, str],
    marks: dict[str, list[str]],
) -> None:
    """Choose grids and round the linears of one input, stacked by rows so that each matrix is factored once."""
    stacked = (
        torch.cat([working.weights[name] for name in linears]) if len(linears) > 1 else working.weights[linears[0]]
    )
    grid = steps.grid
    if steps.search_range:
        scale, zero = search_grid(stacked, grid, gram.diagonal() if steps.compensate else gram)
    else:
        scale, zero = grid_for_range(*full_range(stacked, grid), grid)
    if steps.compensate:
        try:
            factor = inverse_factor(gram, steps.damp, steps.act_order)
        except ModelError as error:
            raise ModelError(f"{', '.join(linears)}: {error.message}", hint=error.hint) from error
        codes, _ = round_compensated(stacked, scale, zero, grid, factor)
        if steps.refine:
            codes, scale = refine(stacked, codes, scale, zero, grid, damped(gram, factor.damp), steps.refine)
        for name in linears:
            if factor.damp != steps.damp:
                notes[name] = f"damping raised from {steps.damp:g} to {factor.damp:g}: the Gram matrix is near singular"
            if bool(factor.dead.any()):
                marks[name].append(f"{int(factor.dead.sum())} dead columns")
    else:
        codes = nearest_codes(stacked, scale, zero, grid)
    start = 0
    for name in linears:
        rows = slice(start, start + working.weights[name].shape[0])
        start = rows.stop
        quantized[name] = GroupTensor(
            codes[rows].contiguous(), scale[rows].contiguous(), None if zero is None else zero[rows].contiguous(), grid
        )
