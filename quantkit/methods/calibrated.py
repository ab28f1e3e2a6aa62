"""What AWQ and GPTQ share: fold scales into what stands before, choose each group's grid, round.

The two methods differ in their defaults and in the file they are written for, not in their steps, so each is a choice
of `Steps`: scales or none, a searched or a full range, rounding to nearest or with error compensation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from quantkit.arena import empty_on
from quantkit.errors import ModelError
from quantkit.maths import fold
from quantkit.maths.affine import full_range, grid_for_range, nearest_codes, search_grid
from quantkit.maths.balance import ROWS, balanced_scale
from quantkit.maths.compensate import round_compensated
from quantkit.maths.correction import CorrectionAccumulator
from quantkit.maths.four_bit import run_length
from quantkit.maths.gram import InputStatistics, Look
from quantkit.maths.gram_factor import GramFactor, factored
from quantkit.maths.measure import energies, sqnr_db
from quantkit.maths.refine import damped, refine
from quantkit.methods.base import (
    BlockResult,
    BlockWeights,
    Method,
    Scales,
    check_finite,
    check_range,
    lost_digits,
    require_finite,
)
from quantkit.methods.folded import FoldedWeights
from quantkit.model.blocks import LinearGroup
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor, written

Correction = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="how much of what went wrong before a linear its weights make up for (GPTAQ): a share of what "
        "halves of the calibration text agree on, such as 0.75; the unquantized model runs along",
    ),
]

Pairs = Annotated[
    int,
    Field(
        ge=0,
        le=20,
        description="sweeps of moves of two codes at a time after the descent, each with one more sweep of it behind",
    ),
]


@dataclass(frozen=True)
class Steps:
    """How a calibrated method treats the linears of one input.

    exponents: steps of the search for scales; 0 leaves the scales out. scales: what they go by. search_range:
    look for the best share of each group's range. compensate: GPTQ's rounding, else to nearest. damp, act_order: of
    GPTQ's rounding. refine: sweeps of coordinate descent over codes and scales after it. correction: share of GPTAQ's
    correction of the weights before they are rounded, as far as halves of the text agree on it. pairs: sweeps of two
    codes at a time after the descent.
    """

    grid: Grid
    exponents: int
    scales: Scales
    search_range: bool
    compensate: bool
    damp: float
    act_order: bool
    refine: int = 0
    correction: float = 0.0
    pairs: int = 0

    def label(self) -> str:
        """What rounds and how, such as "gptq 4-bit g64 asym"."""
        if not self.compensate:
            return f"nearest {self.grid.label()}"
        return f"gptq {self.grid.label()}{' act-order' if self.act_order else ''}"


class CalibratedMethod(Method):
    """A method that rounds by the statistics of the inputs: all at once, or input by input as the block runs."""

    head: ClassVar[bool] = False

    @field_validator("correction", check_fields=False)
    @classmethod
    def _needs_quantized_inputs(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("propagate") == "unquantized":
            raise ValueError(
                "needs propagate: quantized; on the unquantized model's own inputs nothing went wrong before"
            )
        return value

    @property
    def calibrated(self) -> bool:
        return True

    @property
    @abstractmethod
    def steps(self) -> Steps:
        """The settings as steps."""

    @property
    def look(self) -> Look:
        """Scales and the ranges of groups are found from a part of the tokens as well."""
        steps = self.steps
        return Look.WHOLE if steps.compensate or steps.grid.group_size is None else Look.PART

    def begin(self, given: BlockWeights) -> CalibratedBlock:
        """A block whose inputs will be seen one after the other, each behind what was rounded before it."""
        return CalibratedBlock(given, self.steps)

    def quantize_block(self, given: BlockWeights, statistics: dict[str, InputStatistics]) -> BlockResult:
        return self.begin(given).quantize(statistics)


def grid_of(method: Method | None) -> Grid | None:
    """The grid that a linear is rounded onto by its inputs, None where it is not."""
    return method.steps.grid if isinstance(method, CalibratedMethod) else None


class CalibratedBlock:
    """One block under one method's steps: first `fold`, then `round` for each group of linears in the order they run.

    weights: those that are not rounded yet, as they stand now. replaced: {tensor name: float32} for norms and biases
    that a scale was folded into.
    """

    def __init__(self, given: BlockWeights, steps: Steps):
        self.steps = steps
        # behind a norm that is not finite, inputs are not either, which would be told of the linear that reads them
        for name, tensor in [*((f"{name}.weight", one) for name, one in given.weights.items()), *given.others.items()]:
            if tensor.is_floating_point():
                check_finite(name, tensor)
        self.weights = FoldedWeights(given.weights)
        self.given = replace(given, weights={})  # a checkpoint's tensors are not held beside these
        self.replaced: dict[str, Tensor] = {}
        self._input_scale: dict[str, Tensor] = {}
        self._quantized: dict[str, QuantizedTensor] = {}
        self._sqnr: dict[str, float | None] = {}
        self._notes: dict[str, str] = {}
        self._marks: dict[str, list[str]] = {name: [] for name in given.weights}
        self._rows = {name: len(weight) for name, weight in given.weights.items()}

    def ours(self, group: LinearGroup) -> list[str]:
        """The linears of a group that this method quantizes."""
        return [name for name in group.linears if name in self._rows]

    def behind_scale(self, linear: str, gram: Tensor) -> Tensor:
        """The Gram matrix of a linear's inputs once its scale is divided out of them: float32 [in, in]."""
        scale = self._input_scale.get(linear)
        if scale is None:
            return gram
        divisors = empty_on(gram.device, gram.shape)
        torch.outer(scale, scale, out=divisors)  # symmetric to the last bit, as the quotients are then
        return torch.div(gram, divisors, out=divisors)

    def fold(self, statistics: Mapping[str, InputStatistics]) -> None:
        """Find the scale of each shared input and fold it. Raises ModelError when a statistic is not finite."""
        if not self.steps.exponents:
            return
        # Linears that feed other linears of the block are rescaled before their own inputs are looked at.
        for group in sorted(self.given.block.groups, key=lambda group: group.producer_kind == "norm"):
            ours = self.ours(group)
            if ours and group.producer is not None:
                self._fold_group(group, ours, _finite(ours, statistics[ours[0]]))

    def quantize(self, statistics: dict[str, InputStatistics]) -> BlockResult:
        """The whole block at once, by statistics of {linear: its inputs} that are there already. They are used up:
        those of linears that are done are taken out."""
        self.fold(statistics)
        groups = [ours for group in self.given.block.groups if (ours := self.ours(group))]
        for ours in groups:  # in the order they run, so that the first one that is not finite is named
            require_finite(f"inputs of {', '.join(ours)}", statistics[ours[0]].gram.diagonal())
        # the largest Gram matrix is let go first: beside it others would be rounded, which takes as much as it does
        for ours in sorted(groups, key=lambda ours: -len(statistics[ours[0]].gram)):
            gram = self.behind_scale(ours[0], statistics[ours[0]].gram)
            for name in ours:
                del statistics[name]
            self._round_seen(ours, gram)
            del gram
            for name in ours:
                self._sqnr[name] = sqnr_db(*energies(self.weights.pop(name), self._quantized[name].pieces()))
        return self.result()

    def input_scale(self, group: LinearGroup) -> Tensor | None:
        """float32 [in], what folding divided out of the inputs of a group; None when nothing was."""
        return self._input_scale.get(self.ours(group)[0])

    def round(
        self,
        group: LinearGroup,
        gram: Tensor,
        correction: CorrectionAccumulator | None = None,
        by_codes: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor | GroupTensor]:
        """Round the linears of one input.

        gram: float32 [in, in] of the inputs behind the folded scale. correction: what was seen of the unquantized
        model's inputs beside them. by_codes: whether linears can multiply by their codes. Returns the rounded weights
        by linear: [out, in] of `dtype`, or the codes where products with these are for them. Raises ModelError when
        the Gram matrix is not finite.
        """
        ours = self.ours(group)
        self._round_seen(ours, gram, correction)
        return {name: self._to_run(name, dtype, by_codes=by_codes) for name in ours}

    def _round_seen(self, ours: list[str], gram: Tensor, correction: CorrectionAccumulator | None = None) -> None:
        """Round linears of one input; what they are to run as is not made."""
        require_finite(f"inputs of {', '.join(ours)}", gram)
        if correction is not None and self.steps.correction:
            self._correct(ours, gram, correction)
        self._quantized |= self._round(ours, gram)

    def _correct(self, ours: list[str], gram: Tensor, correction: CorrectionAccumulator) -> None:
        """Let the weights of one input make up for what went wrong before it, if its Gram matrix can be solved by."""
        steps = self.steps
        try:
            after, damp = correction.corrected(
                [self.weights[name] for name in ours], gram, steps.damp, steps.correction
            )
        except ModelError as error:
            self._note(ours, f"no correction: {error.message}")
            return
        self.weights.update(zip(ours, after, strict=True))
        if damp != steps.damp:
            self._note(ours, f"damping of the correction raised from {steps.damp:g} to {damp:g}")

    def _to_run(self, name: str, dtype: torch.dtype, *, by_codes: bool) -> Tensor | GroupTensor:
        """A rounded linear as it is to run. How far it is from the weight that it was made of is noted, and that is not
        held any longer."""
        tensor, weight = self._quantized[name], self.weights.pop(name)
        if by_codes and isinstance(tensor, GroupTensor) and run_length(tensor):
            self._sqnr[name] = sqnr_db(*energies(weight, tensor.pieces()))
            return tensor
        decoded = empty_on(weight.device, tensor.shape, dtype)
        self._sqnr[name] = sqnr_db(*energies(weight, written(tensor.pieces(), decoded)))
        return decoded

    def _round(self, ours: list[str], gram: Tensor) -> Mapping[str, QuantizedTensor]:
        """Linears of one input, stacked by rows so that each matrix is factored once."""
        steps, grid = self.steps, self.steps.grid
        stacked = self._stacked(ours)
        for name in ours:
            check_range(f"{name}.weight", self.weights[name], grid)
        if steps.search_range:
            scale, zero = search_grid(stacked, grid, gram.diagonal() if steps.compensate else gram)
        else:
            scale, zero = grid_for_range(*full_range(stacked, grid), grid)
        if steps.compensate:
            codes, scale = self._compensate(ours, stacked, scale, zero, gram)
        else:
            codes = nearest_codes(stacked, scale, zero, grid)
        rounded = {}
        for name, rows in self.rows_of(ours).items():
            own_zero = None if zero is None else zero[rows].contiguous()
            rounded[name] = GroupTensor(codes[rows].contiguous(), scale[rows].contiguous(), own_zero, grid)
            if note := lost_digits(rounded[name]):
                self._note([name], note)
        return rounded

    def _stacked(self, linears: list[str]) -> Tensor:
        """Weights by rows, float32 [sum of out, in], to be read: each is a part of that from now on, not held twice."""
        whole = self.weights.stacked(linears)
        self.weights.update({name: whole[rows] for name, rows in self.rows_of(linears).items()})
        return whole

    def rows_of(self, linears: list[str]) -> dict[str, slice]:
        """Where each linear lies when they are stacked by rows."""
        found, start = {}, 0
        for name in linears:
            found[name] = slice(start, start + self._rows[name])
            start = found[name].stop
        return found

    def label(self, linear: str) -> str:
        """What is done to a linear, such as "gptq 4-bit g64 asym"."""
        return self.steps.label()

    def result(self) -> BlockResult:
        """What was made of the block so far."""
        return BlockResult(
            quantized=self._quantized,
            applied={name: " ".join([self.label(name), *self._marks[name]]) for name in self._quantized},
            replaced=self.replaced,
            notes=self._notes,
            sqnr_db=self._sqnr,
        )

    def _compensate(
        self, ours: list[str], stacked: Tensor, scale: Tensor, zero: Tensor | None, gram: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scales [out, groups] by GPTQ's rounding and the descent after it."""
        steps, grid = self.steps, self.steps.grid
        with self._factored(ours, gram) as factor:
            codes = round_compensated(stacked, scale, zero, grid, factor)
        if steps.refine or steps.pairs:
            with damped(gram, factor.damp) as matrix:
                codes, scale = refine(stacked, codes, scale, zero, grid, matrix, steps.refine, steps.pairs)
        return codes, scale

    def _note(self, linears: list[str], text: str) -> None:
        """Add to what is odd about some linears."""
        for name in linears:
            self._notes[name] = "; ".join(filter(None, (self._notes.get(name), text)))

    @contextmanager
    def _factored(self, linears: list[str], gram: Tensor) -> Iterator[GramFactor]:
        """What error compensation needs of a Gram matrix, as `factored` gives it; what is odd about it is noted. Raises
        ModelError."""
        steps = self.steps
        with ExitStack() as stack:
            try:
                factor = stack.enter_context(factored(gram, steps.damp, steps.act_order))
            except ModelError as error:
                raise ModelError(f"{', '.join(linears)}: {error.message}", hint=error.hint) from error
            self._note_factor(linears, factor)
            yield factor

    def _note_factor(self, linears: list[str], factor: GramFactor) -> None:
        """Note more damping than was asked for, and dead columns."""
        steps = self.steps
        dead = int(factor.dead.sum())
        if factor.damp != steps.damp:
            self._note(
                linears, f"damping raised from {steps.damp:g} to {factor.damp:g}: the Gram matrix is near singular"
            )
        if dead:
            self._note(linears, f"{dead} of {len(factor.dead)} columns had no input and are rounded to nearest")
            for name in linears:
                self._marks[name].append(f"{dead} dead columns")

    def _other(self, name: str) -> Tensor | None:
        """An unquantized tensor of the block as it stands now."""
        if name in self.replaced:
            return self.replaced[name]
        found = self.given.others.get(name)  # finite, as all of them
        return None if found is None else found.float()

    def _fold_group(self, group: LinearGroup, ours: list[str], seen: InputStatistics) -> None:
        """Find the scale of one shared input and move it from the linears that read it to what produces it."""
        reason = self._why_no_scale(group, ours)
        if reason is not None:
            self._note(ours, f"no scale: {reason}")
            return
        assert group.producer is not None
        channels = repeats = 0
        mean_abs = seen.mean_abs
        tie = None
        if group.producer_kind == "value":
            assert self.given.head_dim is not None
            channels = self._rows[group.producer]
            repeats = len(mean_abs) // channels
            tie = partial(fold.mean_over_heads, head_dim=self.given.head_dim, repeats=repeats)
            mean_abs = tie(mean_abs)
        scale, exponent = self._search_scale(ours, mean_abs, seen.gram, tie)
        if group.producer_kind == "norm" and not self._norm_holds(f"{group.producer}.weight", scale):
            reason = f"{group.producer}.weight divided by it would leave float16's range"
            self._note(ours, f"no scale: {reason}")
            return
        for name in ours:
            self._marks[name].append(f"scale^{exponent:g}")
        if exponent == 0.0:
            return
        for name in ours:
            self.weights.multiply_inputs(name, scale)
            self._input_scale[name] = scale
        divisor = scale
        if group.producer_kind == "value":
            assert self.given.head_dim is not None
            divisor = fold.tie_over_heads(scale, self.given.head_dim, repeats, "first")
        self._divide_producer(group, divisor)

    def _search_scale(
        self, linears: list[str], mean_abs: Tensor, gram: Tensor, tie: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, float]:
        """The best power of what scales go by, and the power. tie: as `balanced_scale` takes it."""
        steps, count = self.steps, self.steps.exponents
        tried = self.weights.sampled(linears, fold.sample_rows(len(mean_abs)))
        if steps.scales == "inputs":
            return fold.search_scale(tried, mean_abs, gram, steps.grid, [step / count for step in range(count)])
        base = balanced_scale(self.weights.sampled(linears, ROWS), mean_abs, steps.grid.group_size, tie)
        return fold.search_scale(tried, base, gram, steps.grid, [step / count for step in range(count + 1)])

    def _why_no_scale(self, group: LinearGroup, ours: list[str]) -> str | None:
        """Why the input of a group cannot be rescaled, None when it can."""
        if len(ours) < len(group.linears):
            return f"{', '.join(sorted(set(group.linears) - set(ours)))} read the same input under other settings"
        if group.producer_kind == "norm":
            missing = self._other(f"{group.producer}.weight") is None
            return f"{group.producer}.weight is not stored" if missing else None
        return None if group.producer in self._rows else f"{group.producer} is not quantized by this method"

    def _norm_holds(self, name: str, scale: Tensor) -> bool:
        """Whether a norm's gains, divided by a scale, keep the digits that float16 gives them now."""
        gain = self._other(name)
        assert gain is not None
        offset, half = self.given.norm_offset, torch.finfo(torch.float16)
        after = ((gain + offset) / scale - offset).abs()
        if offset:  # a small gain beside it loses nothing that counts
            return not bool((after > half.max).any())
        lost = (after < half.tiny) & (gain.abs() >= half.tiny)
        return not bool(((after > half.max) | lost).any())

    def _divide_producer(self, group: LinearGroup, scale: Tensor) -> None:
        """Divide the output channels of what feeds a group by its scale."""
        bias_name = f"{group.producer}.bias"
        bias = self._other(bias_name)
        if bias is not None:
            self.replaced[bias_name] = bias / scale
        if group.producer_kind == "norm":
            name = f"{group.producer}.weight"
            gain = self._other(name)
            assert gain is not None
            offset = self.given.norm_offset
            self.replaced[name] = (gain + offset) / scale - offset
            return
        assert group.producer is not None
        self.weights.divide_outputs(group.producer, scale)


def _finite(linears: list[str], seen: InputStatistics) -> InputStatistics:
    require_finite(f"inputs of {', '.join(linears)}", seen.gram)
    return seen
