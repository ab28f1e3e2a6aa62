"""How many rows of tokens may wait inside a block (model/waiting.py): what the run and its forecast both reckon by.

Bytes are those held where the blocks run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.device import Arithmetic
from quantkit.maths.attention import CHUNK
from quantkit.maths.four_bit import held_bytes
from quantkit.maths.int_products import code_bytes
from quantkit.model.blocks import Architecture
from quantkit.model.forward import BATCH_TOKENS, batch_sequences, between_linears


def running_bytes(how: Arithmetic, *, transposed: bool, run: int | None = None) -> float:
    """Of a weight in a block that runs: in 8 bits, which stand for what they were made of, or in the dtype of linears.
    What is left to others there since it is too far off takes more.

    transposed: whether linears are Conv1D, which stay as they are. run: columns of a run, for a weight that was rounded
    and is multiplied by its codes (`maths/four_bit.py`).
    """
    if transposed or not how.eight_bit_linears:
        return how.linears.itemsize
    return code_bytes() if run is None else held_bytes(run)


def left_behind(
    architecture: Architecture,
    how: Arithmetic,
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    heads: int,
    length: int,
) -> tuple[int, int]:
    """Values of a token that the model holds beside hidden states and the input of a linear, behind attention and
    inside of an MLP: queries, keys and values, which our own attention lets go of, the weights of attention that is
    spelled out, what fused linears gave."""
    (queries, _), _, (gates, _), *_ = shapes
    fused = gates if architecture.fused else 0
    weights = 0 if architecture.own_attention else heads * length
    let_go = how.compiled_on(device) and architecture.own_attention and not architecture.fused
    return (0 if let_go else queries) + weights, fused + weights


def rounding_bytes(rows: int, columns: int) -> int:
    """What rounding linears of one input takes, [rows, columns] stacked: a Gram matrix and weights in float32, and as
    much to round by."""
    return 8 * columns * (columns + rows)


@dataclass(frozen=True)
class BlockSizes:
    """What a block and its rows are made of, in numbers.

    shapes: (rows, columns) of the stacked weights of each group of linears. hidden: columns of the states. length: of a
    sequence. heads: how many. state_bytes, linear_bytes: of a value in the states, and in what linears multiply.
    model_bytes, rounded_bytes, stored_bytes: of a weight in the module that runs, before and behind its rounding, and
    as it is stored. ways: how many models run; the unquantized one goes along where there is a correction. device:
    "cpu" or "cuda". left_behind: as `left_behind` gives it. states_in_memory: whether hidden states lie there, and not
    in a file.
    """

    shapes: tuple[tuple[int, int], ...]
    hidden: int
    length: int
    heads: int
    state_bytes: int
    linear_bytes: int
    model_bytes: float
    rounded_bytes: float
    stored_bytes: float
    ways: int
    device: str
    left_behind: tuple[int, int]
    states_in_memory: bool

    @property
    def batch(self) -> int:
        """Sequences that go through the block at once."""
        return batch_sequences(self.device, self.length)

    @property
    def _states_bytes(self) -> int:
        """Of the hidden states of a sequence."""
        return self.ways * self.length * self.hidden * self.state_bytes

    @property
    def _held_bytes(self) -> int:
        """What a sequence holds at most while it waits: for each token hidden states and the widest input of a linear,
        and what else the model holds. What has been read is let go (model/waiting.py)."""
        attention, mlp = self.left_behind
        widest = max(columns for _, columns in self.shapes) * self.linear_bytes
        read = max(self.hidden * self.state_bytes, widest)
        return self._states_bytes + self.ways * self.length * (read + max(attention, mlp) * self.state_bytes)

    @property
    def waiting_bytes(self) -> int:
        """What a sequence that waits in memory takes at most: what it holds, in the place of the hidden states that it
        took where those lay there. They are let go once attention has been added to them; no family that is known adds
        it only at the end of the block."""
        return self._held_bytes - (self._states_bytes if self.states_in_memory and self.device == "cpu" else 0)

    def file_bytes(self, sequences: int) -> int:
        """What so many sequences take of a scratch file while they wait; 0 on another device, where they cannot."""
        return sequences * self._held_bytes if self.device == "cpu" else 0

    @property
    def filed_bytes(self) -> int:
        """What a sequence writes to such a file in a block, and reads from it: inputs of all groups but the first, and
        hidden states beside them."""
        (_, gathered), (_, normed), (_, inner) = self.shapes[1:]
        states = (2 * self.hidden + normed) * self.state_bytes + (gathered + inner) * self.linear_bytes
        return self.ways * self.length * (states + sum(self.left_behind) * self.state_bytes)

    @property
    def batch_bytes(self) -> int:
        """What lies between the linears of a batch that runs, and of sequences longer than a batch the scores and
        weights of attention; those of shorter ones are small beside the rest."""
        rows = max(rows for rows, _ in self.shapes)
        scores = max(0, self.length - BATCH_TOKENS[self.device]) * CHUNK * self.heads * (4 + self.linear_bytes)
        return between_linears(self.device, self.length, self.hidden, rows, self.linear_bytes) + scores

    def rounding_bytes(self, rows: int, columns: int) -> int:
        """What rounding a group takes; for a correction the sums over two halves of the text, of tokens far out, what
        they are together and a factor, and what is moved by how much as well."""
        correction = 20 * columns**2 + 24 * columns * rows if self.ways > 1 else 0
        return rounding_bytes(rows, columns) + correction

    @property
    def grown_bytes(self) -> int:
        """What a block takes more once it is rounded: codes and weights that run, for those that were stored."""
        values = sum(rows * columns for rows, columns in self.shapes)
        running = self.rounded_bytes + (self.ways - 1) * self.model_bytes
        return int(values * max(0.0, 1 + running - self.stored_bytes))

    @property
    def taken_bytes(self) -> int:
        """What is taken at most beside rows that wait: a batch that runs, with the sums it goes into, or the rounding
        of a group; and what the block grows by."""
        sums = 24 if self.ways > 1 else 4
        at_once = [
            max(self.rounding_bytes(rows, columns), self.ways * self.batch_bytes + sums * columns**2)
            for rows, columns in self.shapes
        ]
        return max(at_once) + self.grown_bytes

    def waiting_sequences(self, sequences: int, room: int) -> int:
        """Of so many sequences, those that wait where there are `room` bytes: whole batches, the first ones."""
        fit = max(0, room - self.taken_bytes) // self.waiting_bytes
        return sequences if fit >= sequences else fit // self.batch * self.batch
