"""Codes, scales and minima taken out of the bytes of ggml's blocks, and put back: what solvers work on.

Each type is data: which bytes hold the float16 numbers, which the levels of the groups' scales, which the codes.
Source: llama.cpp, ggml/src/ggml-common.h for the layouts, ggml/src/ggml-quants.c for what the bits mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantkit.maths.ggml import block_layout
from quantkit.maths.ggml_iq4 import LEVELS

Unpack = Callable[[Tensor], Tensor]
"""Bytes uint8 [blocks, n] to numbers uint8 [blocks, m]."""


@dataclass(frozen=True)
class CodedBlocks:
    """A weight [rows, columns] in a block type, taken apart:
    `weight = scale * level * values[code] - minimum * minimum_level`, a block and in it a group at a time.

    codes: uint8 [rows, columns]. scale, minimum: float32 [rows, blocks], exact in float16; minima are zeros in types
    that have none. level, minimum_level: int32 [rows, groups], ones where a group is a whole block.
    """

    codes: Tensor
    scale: Tensor
    level: Tensor
    minimum: Tensor
    minimum_level: Tensor

    def of_rows(self, rows: slice) -> CodedBlocks:
        """Some rows of the weight."""
        return CodedBlocks(*(getattr(self, item.name)[rows] for item in fields(self)))

    def _a_group(self, number: Tensor) -> Tensor:
        return number.repeat_interleave(self.level.shape[1] // self.scale.shape[1], dim=1)

    @property
    def unit(self) -> Tensor:
        """The scale of each group's block: float32 [rows, groups]."""
        return self._a_group(self.scale)

    @property
    def minimum_unit(self) -> Tensor:
        """The minimum of each group's block: float32 [rows, groups]."""
        return self._a_group(self.minimum)

    @property
    def step(self) -> Tensor:
        """What a code's value is multiplied by: float32 [rows, groups]."""
        return self.unit * self.level

    @property
    def base(self) -> Tensor:
        """What is subtracted after that: float32 [rows, groups]."""
        return self.minimum_unit * self.minimum_level


@dataclass(frozen=True)
class Layout:
    """Where a type keeps what.

    bits: of a code. group: weights a group. low: value of the lowest code. values: of all codes where they are not low,
    low + 1 ... scale_at, minimum_at: first byte of the float16 numbers. levels: least and largest level of a group's
    scale, None where a group is a block. minimum_sign: -1 where what is stored is added.
    """

    bits: int
    group: int
    low: int
    scale_at: int
    minimum_at: int | None
    levels: tuple[int, int] | None
    get_codes: Unpack
    put_codes: Callable[[Tensor, Tensor], None]
    get_levels: Unpack | None = None  # the scales' levels, then the minima's
    put_levels: Callable[[Tensor, Tensor], None] | None = None
    minimum_sign: int = 1
    values: tuple[int, ...] = ()

    @property
    def has_minimum(self) -> bool:
        return self.minimum_at is not None

    @property
    def minimum_levels(self) -> tuple[int, int] | None:
        """Least and largest level of a minimum, None where it is a float16 itself or there is none."""
        return self.levels if self.has_minimum else None

    def table(self, device: torch.device) -> Tensor:
        """The value of every code: float32 [2 ** bits]."""
        if self.values:
            return torch.tensor(self.values, dtype=torch.float32, device=device)
        return torch.arange(self.low, self.low + 2**self.bits, dtype=torch.float32, device=device)


def take(data: Tensor, type_name: str) -> CodedBlocks:
    """The parts of a matrix's bytes: uint8 [rows, row_bytes]; type_name is a key of LAYOUTS."""
    layout = LAYOUTS[type_name]
    _, block_bytes = block_layout(type_name)
    rows, blocks = len(data), data.shape[1] // block_bytes
    flat = data.reshape(-1, block_bytes)
    scale = _half(flat, layout.scale_at)
    minimum = torch.zeros_like(scale)
    if layout.minimum_at is not None:
        minimum = _half(flat, layout.minimum_at) * layout.minimum_sign
    if layout.get_levels is None or layout.levels is None:
        levels = minimum_levels = torch.ones(rows, blocks, dtype=torch.int32, device=data.device)
    else:
        found = layout.get_levels(flat).int().view(rows, blocks, -1)
        levels, minimum_levels = found.chunk(2, dim=2) if layout.has_minimum else (found, torch.ones_like(found))
        levels, minimum_levels = (levels + layout.levels[0]).flatten(1), minimum_levels.flatten(1)
    codes = layout.get_codes(flat).view(rows, -1)
    return CodedBlocks(codes, scale.view(rows, blocks), levels, minimum.view(rows, blocks), minimum_levels)


def put(coded: CodedBlocks, type_name: str) -> Tensor:
    """The bytes of what was taken: uint8 [rows, row_bytes]."""
    layout = LAYOUTS[type_name]
    _, block_bytes = block_layout(type_name)
    rows, blocks = coded.scale.shape
    flat = torch.zeros(rows * blocks, block_bytes, dtype=torch.uint8, device=coded.codes.device)
    _put_half(flat, layout.scale_at, coded.scale)
    if layout.minimum_at is not None:
        _put_half(flat, layout.minimum_at, coded.minimum * layout.minimum_sign)
    if layout.put_levels is not None and layout.levels is not None:
        parts = [(coded.level - layout.levels[0]).view(rows * blocks, -1)]
        if layout.has_minimum:
            parts.append(coded.minimum_level.reshape(rows * blocks, -1))
        layout.put_levels(flat, torch.cat(parts, dim=1).to(torch.uint8))
    layout.put_codes(flat, coded.codes.reshape(rows * blocks, -1))
    return flat.view(rows, -1)


def _half(flat: Tensor, start: int) -> Tensor:
    return flat[:, start : start + 2].contiguous().view(torch.float16).float()


def _put_half(flat: Tensor, start: int, values: Tensor) -> None:
    flat[:, start : start + 2] = values.reshape(-1, 1).half().view(torch.uint8)


def _split(data: Tensor, bits: int, width: int) -> Tensor:
    """Numbers of a few bits: in each run of `width` bytes, byte l holds numbers l, l + width ... of it, the first
    lowest. uint8 [blocks, n] to uint8 [blocks, n * 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    runs = data.view(len(data), -1, 1, width)
    return ((runs >> shifts.view(-1, 1)) & (2**bits - 1)).flatten(1)


def _join(numbers: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `_split`; bits above are cut off."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)
    runs = (numbers & (2**bits - 1)).view(len(numbers), -1, 8 // bits, width)
    return (runs << shifts.view(-1, 1)).sum(dim=2, dtype=torch.uint8).flatten(1)


def _codes_of(*parts: tuple[int, int, int, int, int]) -> tuple[Unpack, Callable[[Tensor, Tensor], None]]:
    """How codes are read and written that lie in parts: the first and the last byte + 1 of each, the bits it holds, the
    first of these bits in the code, and the bytes of a run."""

    def get(flat: Tensor) -> Tensor:
        found = [_split(flat[:, first:end].contiguous(), bits, width) << low for first, end, bits, low, width in parts]
        return torch.stack(found).sum(dim=0, dtype=torch.uint8)

    def put_(flat: Tensor, codes: Tensor) -> None:
        for first, end, bits, low, width in parts:
            flat[:, first:end] = _join(codes >> low, bits, width)

    return get, put_


def _get_bytes(flat: Tensor) -> Tensor:
    return flat[:, 2:34] ^ 0x80  # int8 from -128 on


def _put_bytes(flat: Tensor, codes: Tensor) -> None:
    flat[:, 2:34] = codes ^ 0x80


def _get_q6_levels(flat: Tensor) -> Tensor:
    return flat[:, 192:208] ^ 0x80


def _put_q6_levels(flat: Tensor, levels: Tensor) -> None:
    flat[:, 192:208] = levels ^ 0x80


def _get_affine_levels(flat: Tensor) -> Tensor:
    """Q4_K, Q5_K: eight scales and eight minima of six bits in twelve bytes."""
    first, second, third = flat[:, 4:8], flat[:, 8:12], flat[:, 12:16]
    late = ((third & 15) | (first >> 6 << 4), (third >> 4) | (second >> 6 << 4))
    return torch.cat((first & 63, late[0], second & 63, late[1]), dim=1)


def _put_affine_levels(flat: Tensor, levels: Tensor) -> None:
    early, late, minimum, late_minimum = levels.chunk(4, dim=1)
    flat[:, 4:8] = early | (late >> 4 << 6)
    flat[:, 8:12] = minimum | (late_minimum >> 4 << 6)
    flat[:, 12:16] = (late & 15) | ((late_minimum & 15) << 4)


def _get_xs_levels(flat: Tensor) -> Tensor:
    """IQ4_XS: eight levels, four low bits of two in a byte, then two high bits of four in a byte."""
    return _split(flat[:, 4:8].contiguous(), 4, 1) | _split(flat[:, 2:4].contiguous(), 2, 1) << 4


def _put_xs_levels(flat: Tensor, levels: Tensor) -> None:
    flat[:, 4:8] = _join(levels, 4, 1)
    flat[:, 2:4] = _join(levels >> 4, 2, 1)


_Q2_LEVELS = _codes_of((0, 16, 4, 0, 16))
_Q3_LEVELS = _codes_of((96, 104, 4, 0, 8), (104, 108, 2, 4, 4))

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(4, 32, -8, 0, None, None, *_codes_of((2, 18, 4, 0, 16))),
    "Q4_1": Layout(4, 32, 0, 0, 2, None, *_codes_of((4, 20, 4, 0, 16)), minimum_sign=-1),
    "Q5_0": Layout(5, 32, -16, 0, None, None, *_codes_of((6, 22, 4, 0, 16), (2, 6, 1, 4, 1))),
    "Q5_1": Layout(5, 32, 0, 0, 2, None, *_codes_of((8, 24, 4, 0, 16), (4, 8, 1, 4, 1)), minimum_sign=-1),
    "Q8_0": Layout(8, 32, -128, 0, None, None, _get_bytes, _put_bytes),
    "Q2_K": Layout(2, 16, 0, 80, 82, (0, 15), *_codes_of((16, 80, 2, 0, 32)), *_Q2_LEVELS),
    "Q3_K": Layout(3, 16, -4, 108, None, (-32, 31), *_codes_of((32, 96, 2, 0, 32), (0, 32, 1, 2, 32)), *_Q3_LEVELS),
    "Q4_K": Layout(4, 32, 0, 0, 2, (0, 63), *_codes_of((16, 144, 4, 0, 32)), _get_affine_levels, _put_affine_levels),
    "Q5_K": Layout(
        5,
        32,
        0,
        0,
        2,
        (0, 63),
        *_codes_of((48, 176, 4, 0, 32), (16, 48, 1, 4, 32)),
        _get_affine_levels,
        _put_affine_levels,
    ),
    "Q6_K": Layout(
        6,
        16,
        -32,
        208,
        None,
        (-128, 127),
        *_codes_of((0, 128, 4, 0, 64), (128, 192, 2, 4, 32)),
        _get_q6_levels,
        _put_q6_levels,
    ),
    "IQ4_NL": Layout(4, 32, 0, 0, None, None, *_codes_of((2, 18, 4, 0, 16)), values=LEVELS),
    "IQ4_XS": Layout(
        4, 32, 0, 0, None, (-32, 31), *_codes_of((8, 136, 4, 0, 16)), _get_xs_levels, _put_xs_levels, values=LEVELS
    ),
}
"""Every block type whose codes can be chosen by a solver."""
