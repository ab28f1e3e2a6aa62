"""The one statistic that calibrated methods share: the Gram matrix of a linear's inputs and their mean magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    gram: float32 [in, in], the sum of x^T x over all tokens. mean_abs: float32 [in], the mean of |x| over tokens.
    tokens: how many rows were seen.
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: int

    @property
    def importance(self) -> Importance:
        """The diagonal of the Gram matrix: sums of squares over tokens."""
        return Importance(self.gram.diagonal().contiguous(), self.tokens)


def strip_width(columns: int) -> int:
    """Columns of a Gram matrix that are summed in one product: few strips keep the products large, many skip more of
    the lower triangle. A quarter of the matrix was fastest from 576 to 1536 columns."""
    return max(64, -(-columns // 4))


class GramAccumulator:
    """Sums x^T x and |x| over batches of inputs.

    Only float32 is accumulated: a Gram matrix of bfloat16 products is not positive definite.
    """

    def __init__(self, in_features: int, device: torch.device):
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.sum_abs = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [..., in], any float dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        columns = rows.shape[1]
        width = strip_width(columns)
        for start in range(0, columns, width):  # the lower triangle is the mirror of the upper
            strip = slice(start, min(start + width, columns))
            self.gram[strip, start:].addmm_(rows[:, strip].T, rows[:, start:])
        self.sum_abs += rows.abs().sum(dim=0)
        self.tokens += rows.shape[0]

    def result(self) -> InputStatistics:
        """The statistics of everything added so far."""
        width = strip_width(len(self.gram))
        for start in range(width, len(self.gram), width):
            self.gram[start:, start - width : start] = self.gram[start - width : start, start:].T
        return InputStatistics(self.gram, self.sum_abs / max(self.tokens, 1), self.tokens)
