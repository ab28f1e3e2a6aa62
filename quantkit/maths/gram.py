"""The one statistic that calibrated methods share: the Gram matrix of a linear's inputs and their mean magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.arena import empty, empty_on, packed
from quantkit.maths.compiled import readable
from quantkit.maths.int_products import add_gram, rounded_columns
from quantkit.maths.order import mirror
from quantkit.maths.products import add_times_transposed, strips, times_transposed

EIGHT_BIT_TOKENS = 2048
"""Tokens whose 8-bit products are summed as integers before they are scaled: far below where 32 bits would overflow
(2^31 / 127^2 = 133144), few enough that their copies are small beside the hidden states."""

PART_TOGETHER = 1024
"""The same of tokens that are a part of their batches: so many batches wait for them that half as many are held."""

EIGHT_BIT_COLUMNS = 256
"""Below this many columns the rounding takes what the products save."""

SUM_TOKENS = 64
"""Tokens whose sums one thread takes; fixed, so that sums do not depend on how many threads there are."""

FAR_ROUNDS = 4
"""How often tokens are told apart as too far out, each time by the mean square of those that are left."""

HUGE_TOKENS = 256
"""Huge tokens that are multiplied together: a few at a time would be many passes over the whole matrix."""

REACH = 20.0
"""How many times its root mean square a column's 8-bit steps reach: (20 / 127)^2 / 12 = 0.2% of the mean square is
added by rounding. Where the largest value is nearer, the steps are as fine as it allows."""

HUGE = 4.0
"""How many times as far out a token may be and still be multiplied in 8 bits, together with others like it in steps of
their own, which add up to HUGE^2 times as much for each of them. They are 4% of the tokens before SmolLM2's
`down_proj`, so that is less than what the steps of the others add."""


class Look(Enum):
    """What is to be seen of a linear's inputs: the squares of all tokens, or the Gram matrix of a part of them, which
    tells enough of a group's own block, or of all, which whole rows take."""

    SQUARES = "squares"
    PART = "part"
    WHOLE = "whole"


@dataclass(frozen=True)
class Importance:
    """How much each input column of a linear counts: the mean of its squares, kept as llama.cpp's imatrix keeps it.

    squares: float32 [in], sums of squares. count: what they are sums over, tokens or calls.
    """

    squares: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """float32 [in]; ones where nothing was seen."""
        if self.count <= 0:
            return torch.ones_like(self.squares)
        # a tensor: a Python number may be divided by as a product with its rounded reciprocal
        return self.squares / self.squares.new_tensor(float(self.count))


@dataclass(frozen=True)
class InputStatistics:
    """What is known of the inputs of a linear.

    gram: float32 [in, in], the sum of x^T x over all tokens; [0, 0] where only the squares were asked for. mean_abs:
    float32 [in], the mean of |x| over tokens. tokens: how many rows were seen. squares: float32 [in], the sum of x^2
    where it is known better than by the diagonal of the Gram matrix.
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: int
    squares: Tensor | None = None

    @property
    def importance(self) -> Importance:
        """Sums of squares over tokens."""
        squares = self.gram.diagonal().contiguous() if self.squares is None else self.squares
        return Importance(squares, self.tokens)


class ColumnSums:
    """Sums over each column of inputs as `readable` gives them, tokens that are far out left aside.

    far: bool [tokens], none at first unless told. parts: float32 [bands of SUM_TOKENS tokens, 3, in], the sum of |x|,
    the sum of x^2 and the largest |x|.
    """

    def __init__(self, rows: NDArray[Any], far: Tensor | None = None):
        self.rows = rows
        self.far = torch.zeros(len(rows), dtype=torch.bool) if far is None else far
        bands = -(-len(rows) // SUM_TOKENS)
        self.parts = torch.empty(bands, 3, rows.shape[1])
        self._sum(np.arange(bands))

    def _sum(self, bands: NDArray[np.int64]) -> None:
        from quantkit.maths.gram_kernels import column_sums

        column_sums(len(bands), self.rows, self.far.numpy(), SUM_TOKENS, bands, self.parts.numpy())

    def leave_aside(self, reach: Tensor) -> bool:
        """Tokens with a value beyond `reach` float32 [in] are far from now on. Returns whether there were any."""
        from quantkit.maths.gram_kernels import bands_beyond, mark_far

        bands = bands_beyond(self.parts.numpy(), reach.numpy())
        if bands.size:
            mark_far(len(bands), self.rows, reach.numpy(), SUM_TOKENS, bands, self.far.numpy())
            self._sum(bands)
        return bool(bands.size)


def totals(pieces: Sequence[ColumnSums]) -> Tensor:
    """Over all rows that are not far, of each column: float32 [3, in], the sum of |x|, of x^2 and the largest |x|."""
    from quantkit.maths.gram_kernels import add_bands

    found = torch.zeros(3, pieces[0].rows.shape[1])
    for piece in pieces:
        add_bands(piece.parts.numpy(), found.numpy())
    return found


class SquaresAccumulator:
    """Sums x^2 and |x| over batches of inputs: what is left of a Gram matrix of which only the diagonal is wanted."""

    def __init__(self, in_features: int, device: torch.device):
        # double: one long sum, where a matrix product has many short ones
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._sum_abs = torch.zeros_like(self._squares)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [..., in], any float dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # [tokens, in]
        self.tokens += rows.shape[0]
        wide = rows.float()
        self._squares += wide.square().sum(dim=0)
        self._sum_abs += wide.abs().sum(dim=0)

    def settle(self) -> None:
        """No inputs are held."""

    def result(self) -> InputStatistics:
        """The statistics of everything added so far, without a Gram matrix."""
        mean_abs = (self._sum_abs / max(self.tokens, 1)).float()
        return InputStatistics(mean_abs.new_zeros(0, 0), mean_abs, self.tokens, self._squares.float())


class Accumulator(Protocol):
    """Takes batches of inputs and has statistics of them at the end."""

    def add(self, inputs: Tensor) -> None:
        """inputs: [..., in], any float dtype; must not change until they are settled."""

    def settle(self) -> None:
        """Let go of inputs, of which no more are to come; what is added after all may give other bits."""

    def result(self) -> InputStatistics:
        """The statistics of everything added so far."""


class GramAccumulator:
    """Sums x^T x and |x| over batches of inputs.

    Sums are float32: a Gram matrix of bfloat16 sums is not positive definite. eight_bit: multiply 8-bit integers, which
    is up to four times as fast (`maths/int_products.py`). Each column is then rounded in steps of at most REACH / 127
    of its own root mean square, which adds at most 0.2% to a diagonal element, a fifth of GPTQ's usual damping; tokens
    with a value farther out, few as a rule, have coarser steps of their own (HUGE), and huge ones are multiplied in
    float32. What is summed is the Gram matrix of the rounded inputs, so it stays positive semidefinite. For the CPU.
    every: of how many tokens of a batch one counts.
    """

    def __init__(self, in_features: int, device: torch.device, *, eight_bit: bool = False, every: int = 1):
        # nothing is in it until the first product, which need not be added to zeros
        self._gram = empty_on(device, (in_features, in_features))
        self._fresh = True
        self.sum_abs = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self._every = every
        self._together = EIGHT_BIT_TOKENS if every == 1 else PART_TOGETHER
        self._eight_bit = eight_bit and in_features >= EIGHT_BIT_COLUMNS
        self._squares = torch.zeros_like(self.sum_abs) if self._eight_bit else None
        self._waiting: list[tuple[Tensor, ColumnSums]] = []
        self._far: list[Tensor] = []
        self._huge: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """inputs: [..., in], any float dtype; must not change until the result is taken."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # [tokens, in]
        if self._every > 1:
            rows = packed(rows[:: self._every])  # a copy: a view would hold all of them
        self.tokens += rows.shape[0]
        if not self._eight_bit:
            wide = rows.float()
            self.sum_abs += wide.abs().sum(dim=0)
            self._add_product(wide)
            return
        self._waiting.append((rows, ColumnSums(readable(rows))))  # while the inputs are in the cache
        if sum(len(rows) for rows, _ in self._waiting) >= self._together:
            self._add_waiting()

    def _add_product(self, rows: Tensor) -> None:
        """rows: float32 [tokens, in]."""
        turned = rows.T.contiguous()
        for strip in strips(len(turned)):
            left, right, own = turned[strip], turned[strip.start :], self._gram[strip, strip.start :]
            own.copy_(times_transposed(left, right)) if self._fresh else add_times_transposed(own, left, right)
        self._fresh = False

    def _add_waiting(self) -> None:
        """Add the batches that wait, in 8-bit integers."""
        pieces = [piece for _, piece in self._waiting]
        tokens = near = sum(len(piece.rows) for piece in pieces)
        for round_ in range(FAR_ROUNDS):
            sums, squares, largest = totals(pieces)
            if not round_:
                assert self._squares is not None
                self.sum_abs += sums
                self._squares += squares
            reach = REACH * (squares / max(near, 1)).sqrt()
            scale = torch.minimum(reach, largest) / 127
            found = [piece.leave_aside(reach) for piece in pieces]
            if not any(found):
                break  # what a huge token adds to a column's mean square must not coarsen the steps of the others
            near = tokens - sum(int(piece.far.sum()) for piece in pieces)
        beyond = [rows[piece.far] for rows, piece in self._waiting] if near < tokens else []
        codes = rounded_columns(pieces, scale)
        del pieces
        self._waiting.clear()  # inputs of earlier batches are not held while their codes are multiplied
        self._add_codes(codes, scale)
        if beyond:
            self._add_beyond(torch.cat(beyond), reach)

    def _add_beyond(self, rows: Tensor, reach: Tensor) -> None:
        """Add tokens with values beyond `reach` float32 [in]: rows [tokens, in] of the inputs' dtype."""
        bounded = (rows.abs() <= HUGE * reach).all(dim=1)  # a NaN is not
        if bool(bounded.any()):
            self._far.append(rows[bounded])
        if not bool(bounded.all()):
            self.add_huge(rows[~bounded].float())
        if sum(map(len, self._far)) >= EIGHT_BIT_TOKENS:
            self._add_far()

    def _add_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Add the products of codes of `rounded_columns` with steps of `scale` float32 [in]."""
        add_gram(codes, scale, self._gram, fresh=self._fresh)
        self._fresh = False

    def _add_far(self) -> None:
        """Add tokens far out that are not huge, together."""
        dtype = reduce(torch.promote_types, [rows.dtype for rows in self._far])
        whole = empty((sum(map(len, self._far)), self._far[0].shape[1]), dtype)
        piece = ColumnSums(readable(torch.cat(self._far, out=whole)))
        self._far.clear()
        scale = totals([piece])[2] / 127
        self._add_codes(rounded_columns([piece], scale), scale)

    def add_huge(self, rows: Tensor) -> None:
        """Add tokens, float32 [tokens, in], to the Gram matrix alone by float32 products, HUGE_TOKENS together."""
        self._huge.append(rows)
        if sum(map(len, self._huge)) >= HUGE_TOKENS:
            *whole, rest = torch.cat(self._huge).split(HUGE_TOKENS)
            for part in whole:
                self._add_product(part)
            self._huge = [rest]

    def settle(self) -> None:
        """Add the inputs that wait for others, of which no more come. Copies of tokens far out wait for the result."""
        if self._waiting:
            self._add_waiting()

    def result(self) -> InputStatistics:
        """The statistics of everything added so far."""
        self.settle()
        if self._far:
            self._add_far()
        if self._huge:
            self._add_product(torch.cat(self._huge))
            self._huge.clear()
        if self._fresh:
            self._gram.zero_()
        mirror(self._gram)
        return InputStatistics(self._gram, self.sum_abs / max(self.tokens, 1), self.tokens, self._squares)
