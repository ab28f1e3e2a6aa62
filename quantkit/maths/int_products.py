"""Products of 8-bit integers on a CPU, summed in 32 bits: by loops of our own for AVX-512's units and for AVX2, else
torch's.

Without units torch multiplies them one by one, a hundred times slower than float32 is there; with them it writes
sums of 32 bits for another loop to scale, and of a Gram matrix it multiplies what is below the diagonal too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from quantkit.arena import empty
from quantkit.device import has_avx2, has_int8_units, multiplies_quads
from quantkit.maths.compiled import writable
from quantkit.maths.products import strips


class Tokens(Protocol):
    """Inputs of a linear."""

    rows: NDArray[Any]
    """[tokens, columns], float32 or the bits of bfloat16."""

    far: Tensor
    """bool [tokens], those that are left aside."""


class Way(Protocol):
    """A way to multiply codes."""

    name: str
    code_bytes: int
    """Bytes that a code of a right factor takes."""

    def lay(self, codes: Tensor) -> Tensor:
        """Codes int8 [n, k] in the order in which they are multiplied as the right factor of `left @ right.T`."""

    gates: bool
    """Whether it can write a gated activation over the gates that are in the place of outputs."""

    def multiply(self, left: Tensor, laid: Tensor, *numbers: Any, gates: bool = False) -> None:
        """outputs = products of codes int8 [m, k] and a right factor, scaled. numbers: along, across, bias and outputs,
        as in `RightFactor.scaled_products`. gates: whether outputs hold gates."""

    def columns(self, pieces: Sequence[Tokens], inverse: Tensor) -> Tensor:
        """Codes `round(x * inverse)` of inputs, 0 of tokens that are left aside, as `add` takes them. inverse: float32
        [columns]."""

    def add(
        self, left: Tensor, across: Tensor, right: Tensor, along: Tensor, total: Tensor, *, upper: bool, fresh: bool
    ) -> None:
        """Add left^T right, scaled, to `total`, as `add_gram` and `add_products` do. upper: what is below the diagonal
        may be left out."""


class Torch:
    """torch's products, and loops that scale them."""

    name = "torch"
    code_bytes = 1
    gates = False

    def lay(self, codes: Tensor) -> Tensor:
        """int8 [k, n], a view."""
        return codes.T

    def multiply(self, left: Tensor, laid: Tensor, *numbers: Any, gates: bool = False) -> None:
        """As of all ways."""
        from quantkit.maths.eight_bit_kernels import scale_products

        scale_products(len(left), self._products(left, laid).numpy(), *numbers)

    def columns(self, pieces: Sequence[Tokens], inverse: Tensor) -> Tensor:
        """int8 [tokens of all pieces, columns]."""
        return _rounded(pieces, inverse)

    def add(
        self, left: Tensor, across: Tensor, right: Tensor, along: Tensor, total: Tensor, *, upper: bool, fresh: bool
    ) -> None:
        """As of all ways."""
        from quantkit.maths.gram_kernels import add_scaled

        for strip in strips(len(total)):
            behind = slice(strip.start if upper else 0, None)
            product = self._products(left[:, strip].T, right[:, behind])
            own: Any = total[strip, behind].numpy()
            add_scaled(len(product), product.numpy(), across[strip].numpy(), along[behind].numpy(), own, fresh)

    @staticmethod
    def _products(left: Tensor, right: Tensor) -> Tensor:
        """left @ right: int32 [m, n] for int8 [m, k] and [k, n]."""
        return torch._int_mm(left, right, out=empty((left.shape[0], right.shape[1]), torch.int32))


class Pairs:
    """Loops for AVX2 (`maths/int_kernel.py`): panels int32 [panels, pairs, 16], two 16-bit integers in each."""

    name = "pairs"
    code_bytes = 2
    gates = False

    def lay(self, codes: Tensor) -> Tensor:
        """As panels."""
        from quantkit.maths.int_kernel import TILE_COLUMNS, lay_rows

        return _laid(lay_rows, codes.contiguous(), _panels(len(codes), -(-codes.shape[1] // 2), TILE_COLUMNS))

    def multiply(self, left: Tensor, laid: Tensor, *numbers: Any, gates: bool = False) -> None:
        """As of all ways."""
        from quantkit.maths.int_kernel import multiply_panels

        count, tasks = _tasks(len(left))
        multiply_panels(count, left.numpy(), laid.numpy(), *numbers, tasks)

    def columns(self, pieces: Sequence[Tokens], inverse: Tensor) -> Tensor:
        """int8 [tokens of all pieces, columns]."""
        return _rounded(pieces, inverse)

    def add(
        self, left: Tensor, across: Tensor, right: Tensor, along: Tensor, total: Tensor, *, upper: bool, fresh: bool
    ) -> None:
        """As of all ways."""
        from quantkit.maths.int_kernel import TILE_COLUMNS, TILE_ROWS, add_panels, lay_left, lay_right

        pairs = -(-len(left) // 2)
        rows = _laid(lay_left, left, _panels(left.shape[1], pairs, TILE_ROWS))
        columns = _laid(lay_right, right, _panels(right.shape[1], pairs, TILE_COLUMNS))
        count, tasks = _tasks(len(total))
        given = (part.numpy() for part in (rows, columns, across, along, total))
        add_panels(count, *given, upper, fresh, tasks)


class Quads:
    """Loops for AVX-512's units (`maths/quads_kernel.py`): panels int32 [panels, 1 + quads, 64], four codes in each but
    for the first line, which is what sums begin with."""

    name = "quads"
    code_bytes = 1
    gates = True

    def lay(self, codes: Tensor) -> Tensor:
        """As panels."""
        from quantkit.maths.quads_kernel import QUAD, TILE_COLUMNS, lay_rows

        whole = _whole(codes)
        return _laid(lay_rows, whole, _panels(len(whole), 1 + whole.shape[1] // QUAD, TILE_COLUMNS))

    def multiply(self, left: Tensor, laid: Tensor, *numbers: Any, gates: bool = False) -> None:
        """As of all ways."""
        from quantkit.maths.quads_kernel import multiply_quads

        count, tasks = _tasks(len(left))
        multiply_quads(count, _whole(left).numpy(), laid.numpy(), *numbers, gates, tasks)

    def columns(self, pieces: Sequence[Tokens], inverse: Tensor) -> Tensor:
        """As panels; a piece begins with a line of its own."""
        from quantkit.maths.quads_kernel import QUAD, TILE_COLUMNS, lay_rounded, steps_of, take_offset

        quads = [-(-len(piece.rows) // QUAD) for piece in pieces]
        panels = _panels(len(inverse), 1 + sum(quads), TILE_COLUMNS)
        panels[:, 0] = 0
        begin = 1
        for piece, count in zip(pieces, quads, strict=True):
            sums = torch.empty(steps_of(count), len(panels) * TILE_COLUMNS, dtype=torch.int32)
            given = (piece.rows, inverse.numpy(), piece.far.numpy(), begin, panels.numpy(), sums.numpy())
            lay_rounded(len(sums), *given)
            take_offset(sums.numpy(), panels.numpy())
            begin += count
        return panels

    def add(
        self, left: Tensor, across: Tensor, right: Tensor, along: Tensor, total: Tensor, *, upper: bool, fresh: bool
    ) -> None:
        """As of all ways."""
        from quantkit.maths.quads_kernel import add_quad_panels

        count, tasks = _tasks(len(total))
        given = (part.numpy() for part in (left, right, across, along, total))
        add_quad_panels(count, *given, upper, fresh, tasks)


def way() -> Way:
    """The way of this processor. Where there are neither units nor AVX2 it is torch's, which runs anywhere, though
    nothing asks for it."""
    if multiplies_quads():
        return Quads()
    return Pairs() if has_avx2() and not has_int8_units() else Torch()


def code_bytes() -> int:
    """Bytes that a code of a right factor takes."""
    return way().code_bytes


@dataclass(frozen=True)
class RightFactor:
    """The right factor of `left @ right.T`. laid: its codes, in the order of `way`. rows, columns: n, k."""

    laid: Tensor
    rows: int
    columns: int
    way: Way

    def scaled_products(
        self, left: Tensor, along: Tensor, across: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """left @ right.T * along[:, None] * across + bias: float32 or bfloat16 [m, n].

        left: codes int8 [m, k]; k is at most 133144, beyond which sums might overflow. along: float32 [m]. across,
        bias: float32 [n]. Raises ValueError for codes of another k.
        """
        outputs = empty((len(left), self.rows), dtype)
        self._multiply(left, along, across, bias, outputs, gates=False)
        return outputs

    def write_gated(self, left: Tensor, along: Tensor, across: Tensor, bias: Tensor, gates: Tensor) -> None:
        """What `scaled_products` gives in the dtype of gates, float32 or bfloat16 [m, n] in one piece, times SiLU of
        these, over them. Only where `way.gates` says so."""
        self._multiply(left, along, across, bias, gates, gates=True)

    def _multiply(
        self, left: Tensor, along: Tensor, across: Tensor, bias: Tensor, outputs: Tensor, *, gates: bool
    ) -> None:
        if left.shape[1] != self.columns:
            raise ValueError(f"{left.shape[1]} columns times {self.columns}")
        numbers = along.numpy(), across.numpy(), bias.numpy(), writable(outputs)
        self.way.multiply(left, self.laid, *numbers, gates=gates)


def right_factor(codes: Tensor) -> RightFactor:
    """Codes int8 [n, k] as the right factor of products."""
    ours = way()
    return RightFactor(ours.lay(codes), codes.shape[0], codes.shape[1], ours)


def rounded_columns(pieces: Sequence[Tokens], scale: Tensor) -> Tensor:
    """8-bit codes of inputs in steps of `scale` float32 [n], 0 for tokens that are left aside, in the order in which
    `add_gram` and `add_products` take them. Of at most 133144 tokens, beyond which sums might overflow."""
    return way().columns(pieces, torch.where(scale > 0, 1 / scale, torch.zeros_like(scale)))


def add_gram(codes: Tensor, scale: Tensor, gram: Tensor, *, fresh: bool) -> None:
    """Add codes^T codes, scaled, to the upper triangle of `gram` float32 [n, n]; what is below it may change too.

    codes: of n columns, by `rounded_columns`. scale: float32 [n], the step of each. fresh: `gram` holds nothing yet.
    """
    way().add(codes, scale, codes, scale, gram, upper=True, fresh=fresh)


def add_products(left: Tensor, across: Tensor, right: Tensor, along: Tensor, total: Tensor) -> None:
    """Add left^T right, scaled, to `total` float32 [m, n]: codes of m and n columns by `rounded_columns`, of the same
    pieces of tokens, and steps of their columns float32 [m] and [n]."""
    way().add(left, across, right, along, total, upper=False, fresh=False)


def _rounded(pieces: Sequence[Tokens], inverse: Tensor) -> Tensor:
    """Codes int8 [tokens of all pieces, columns], one after another."""
    from quantkit.maths.gram_kernels import round_rows

    lengths = [len(piece.rows) for piece in pieces]
    codes = empty((sum(lengths), len(inverse)), torch.int8)
    for piece, own in zip(pieces, codes.split(lengths), strict=True):
        round_rows(len(piece.rows), piece.rows, inverse.numpy(), piece.far.numpy(), own.numpy())
    return codes


def _panels(rows: int, lines: int, width: int) -> Tensor:
    """Room for so many rows as panels of `width` each: int32 [panels, lines, width]."""
    return empty((-(-rows // width), lines, width), torch.int32)


def _laid(lay: Any, codes: Tensor, panels: Tensor) -> Tensor:
    """Panels, with codes laid in them by a loop."""
    lay(len(panels), codes.numpy(), panels.numpy())
    return panels


def _whole(codes: Tensor) -> Tensor:
    """Codes [rows, k] in one piece, with zeros behind them up to a whole number of quads."""
    from quantkit.maths.quads_kernel import QUAD

    missing = -codes.shape[1] % QUAD
    return pad(codes, (0, missing)) if missing else codes.contiguous()


def _tasks(rows: int) -> tuple[int, int]:
    """How many tasks there are for so many rows, and how many of each block of rows."""
    from quantkit.maths import int_kernel

    tasks = int_kernel.tasks_of_block(rows, torch.get_num_threads())
    return int_kernel.blocks_of(rows) * tasks, tasks
