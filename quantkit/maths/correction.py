"""Aim rounded linears at what the unquantized model's would give, though their own inputs have changed meanwhile.

With X the inputs behind all that was rounded before and X' the unquantized model's, a linear should come near W X', not
W X. The weight whose output on X is nearest to W X' is W + W D H^-1, with D = (X' - X)^T X and H = X^T X; rounding goes
on from there. Source: Li et al. 2025, GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration,
section 3, of which this is the part that moves the weights before they are rounded.

Where the output is added to hidden states that have changed as well, from R' to R, the sum should come near W X' + R':
that is W + (W D + E) H^-1, with E = (R' - R)^T X.

Part of it is of the calibration text alone: with as many columns as tokens any change would be told by the inputs. So
sums are kept over two halves of the text, and as much is taken as the halves agree on (`_agreed`). docs/quality.md has
what all this is worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.arena import empty, empty_on
from quantkit.errors import ModelError
from quantkit.maths.compiled import readable
from quantkit.maths.gram import (
    EIGHT_BIT_COLUMNS,
    EIGHT_BIT_TOKENS,
    ColumnSums,
    GramAccumulator,
    totals,
)
from quantkit.maths.gram_factor import factored
from quantkit.maths.int_products import add_products, rounded_columns
from quantkit.maths.products import times_transposed

FAR = 16.0
"""How many times the median of its batch a token's squared length may be, or the square of its change: the few tokens
beyond, whose activations are hundreds of times as large, would decide the correction for all the others."""

LEFT = 1e-3
"""The share of all squared inputs that tokens which are not far out have at least: less of it is lost where theirs are
subtracted. SmolLM2's have a tenth and more."""

COMPARED_ROWS = 128
"""Rows of a weight by which the halves of the text are compared."""


class _Half:
    """Sums over a half of the text: D float32 [in, in] and, where there are states, E float32 [out, in]."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self._waiting: list[tuple[ColumnSums, ...]] = []  # for 8-bit products: inputs, and what changed

    def add(self, rows: Tensor, changed: Sequence[Tensor], far: Tensor, dtype: torch.dtype | None) -> None:
        """rows: [tokens, in]. changed: [tokens, in] and [tokens, out]. far: bool [tokens]. dtype: of the products, None
        for integers."""
        if not self.totals:
            shapes = [(one.shape[1], rows.shape[1]) for one in changed]
            self.totals = [empty_on(rows.device, shape).zero_() for shape in shapes]
        if not len(rows):
            return
        if dtype is None:
            self._waiting.append(tuple(ColumnSums(readable(one), far) for one in (rows, *changed)))
            if sum(len(own.rows) for own, *_ in self._waiting) >= EIGHT_BIT_TOKENS:
                self.finish()
            return
        near = far.logical_not()
        own = rows[near].to(dtype)
        for total, one in zip(self.totals, changed, strict=True):
            total += one[near].to(dtype).T @ own

    def finish(self) -> None:
        """Add what waits, in 8-bit integers."""
        if not self._waiting:
            return
        coded = []
        for pieces in zip(*self._waiting, strict=True):
            scale = totals(pieces)[2] / 127
            coded.append((rounded_columns(pieces, scale), scale))
        self._waiting.clear()
        (own, own_scale), *others = coded
        for total, (codes, scale) in zip(self.totals, others, strict=True):
            add_products(codes, scale, own, own_scale, total)


class CorrectionAccumulator:
    """Sums D, and E where there are states, over the tokens that are not far out, and X^T X over those that are.

    scale: float32 [in], what is divided out of the inputs X already and has still to be out of X', None where nothing
    is. dtype: what the products are computed in; sums are float32. eight_bit: multiply 8-bit integers, each column of
    2048 tokens in steps of its own, as Gram matrices do; for the CPU.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        dtype: torch.dtype,
        scale: Tensor | None,
        *,
        eight_bit: bool = False,
    ):
        self._halves = [_Half(), _Half()]
        self._far = GramAccumulator(in_features, device)
        self._dtype = None if eight_bit and in_features >= EIGHT_BIT_COLUMNS else dtype
        self._factors = torch.ones(in_features, device=device) if scale is None else 1 / scale

    def add(self, unquantized: Tensor, inputs: Tensor, states_change: Tensor | None = None) -> None:
        """A batch of tokens on both ways: [..., in] each, any float dtype; they must not change until the result is
        taken. states_change: [..., out], how far the unquantized model's hidden states are from those that the output
        is added to; in every batch or in none."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # [tokens, in]
        before = unquantized.detach().reshape(rows.shape)
        moved, lengths = self._changes(before, rows)
        changed = [moved]
        if states_change is not None:
            changed.append(states_change.detach().reshape(len(rows), -1).float())
            squares = torch.square(changed[1], out=empty_on(rows.device, changed[1].shape))
            lengths = torch.cat([lengths, squares.sum(dim=1)[None]])
        far = (lengths > FAR * lengths.median(dim=1, keepdim=True).values).any(dim=0)
        if bool(far.any()):
            self._far.add_huge(rows[far].float())
        middle = len(rows) // 2
        for half, part in zip(self._halves, (slice(middle), slice(middle, None)), strict=True):
            half.add(rows[part], [one[part] for one in changed], far[part], self._dtype)

    def _changes(self, unquantized: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """X' - X, [tokens, in], and the squared lengths of X and of that, float32 [2, tokens]."""
        if self._dtype is not None:
            change = unquantized.float() * self._factors - rows.float()
            return change, torch.stack([rows.float().square().sum(dim=1), change.square().sum(dim=1)])
        from quantkit.maths.correction_kernel import changes

        change, lengths = empty(rows.shape, torch.bfloat16), torch.empty(2, len(rows))
        factors, out = self._factors.numpy(), change.view(torch.uint16).numpy()
        changes(len(rows), readable(unquantized), readable(rows), factors, out, lengths.numpy())
        return change, lengths

    def totals(self) -> list[Tensor]:
        """D float32 [in, in] of all tokens and, where there are states, E float32 [out, in]."""
        for half in self._halves:
            half.finish()
        first, second = (half.totals for half in self._halves)
        return [
            torch.add(one, other, out=empty_on(one.device, one.shape)) for one, other in zip(first, second, strict=True)
        ]

    def corrected(
        self, weights: Sequence[Tensor], gram: Tensor, damp: float, share: float
    ) -> tuple[list[Tensor], float]:
        """The weights to round of linears that read this input, float32 [out, in] each, and the damping that it took.

        gram: float32 [in, in] of all inputs X. damp: share of the mean diagonal added to it, or more where it has no
        factor with that. share: of the correction that the halves of the text agree on. Raises ModelError when the Gram
        matrix has no factor, and where tokens that are far out leave next to nothing of it.
        """
        whole = self.totals()
        made = []
        near = torch.sub(gram, self._far.result().gram, out=empty_on(gram.device, gram.shape))
        left = float(near.trace() / gram.trace())
        if left < LEFT:
            raise ModelError(f"few tokens, far out, hold all but {left:.1e} of what its inputs do")
        with factored(near, damp, act_order=False) as factor:
            upper = factor.upper
            for weight in weights:
                outputs = _outputs(_missed(whole, weight), upper)
                moved = _solved(outputs, upper, upper=True).mul_(share * self._agreed(weight, upper))
                made.append(torch.add(weight, moved, out=empty_on(weight.device, weight.shape)))
            return made, factor.damp

    def _agreed(self, weight: Tensor, upper: Tensor) -> float:
        """The share of a weight's correction that is no matter of chance.

        Each half of the text gives a correction, A and B; measured by what they do to the outputs, <A, B> is what both
        tell, and |A|^2 and |B|^2 have each half's chance in them as well. Of their sum the best share, by its expected
        error on other text, is 4 <A, B> / |A + B|^2.
        """
        rows = slice(None, None, max(1, len(weight) // COMPARED_ROWS))
        first, second = (_outputs(_missed(half.totals, weight, rows), upper) for half in self._halves)
        both = float((first + second).square().sum())
        return min(1.0, max(0.0, 4 * float((first * second).sum()) / both)) if both > 0 else 0.0


def _outputs(missed: Tensor, upper: Tensor) -> Tensor:
    """M R^-T for M = C H of a change C of the weight, that is C R, of which each row is as long as what the change does
    to the outputs. Both float32 [rows, in]; upper: R, with R R^T = H; what is below its diagonal is not read."""
    return _solved(missed, upper.T, upper=False)


def _solved(matrix: Tensor, triangle: Tensor, *, upper: bool) -> Tensor:
    """X with X @ triangle = matrix, float32 [rows, in], by columns as LAPACK takes it. upper: which half is read."""
    found = empty_on(matrix.device, matrix.T.shape).T
    return torch.linalg.solve_triangular(triangle, matrix, upper=upper, left=False, out=found)


def _missed(totals: Sequence[Tensor], weight: Tensor, rows: slice = slice(None)) -> Tensor:
    """W D + E of some rows of the weight, float32 [rows, in]. totals: D and, where there are states, E."""
    change, *states = totals
    missed = times_transposed(weight[rows], change.T)
    return missed.add_(states[0][rows]) if states else missed
