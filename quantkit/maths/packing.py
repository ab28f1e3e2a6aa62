"""Codes in machine words: 2, 3, 4 and 8 bits into int32, low bits first, without a loop over elements.

A code may straddle two words (3 bits: 32 codes in 3 words). Everything works along the last dimension; formats that
pack along the other one transpose.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of a word, low bits first. Source: AutoAWQ's WQLinear_GEMM.from_linear."""


_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What so many bytes are seen as."""


def words_for(count: int, bits: int) -> int:
    """How many int32 words `count` codes take."""
    return math.ceil(count * bits / 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int32 [rows, ceil(columns * bits / 32)] for codes [rows, columns] of any integer dtype, each below 2**bits.

    Unused bits of the last word are zero.
    """
    rows, columns = codes.shape
    period, words = _period(bits)
    if 8 % bits == 0 and sys.byteorder == "little":
        return _pack_bytes(codes, bits, -columns % period)
    padded = torch.zeros(rows, -(-columns // period) * period, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    chunks = padded.view(rows, -1, period)  # [rows, chunks, period]
    packed = torch.zeros(rows, chunks.shape[1], words, dtype=torch.int64, device=codes.device)
    for position in range(period):  # at most 32 steps, whatever the size of the matrix
        word, shift = divmod(position * bits, 32)
        packed[:, :, word] |= (chunks[:, :, position] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            packed[:, :, word + 1] |= chunks[:, :, position] >> (32 - shift)
    flat = packed.reshape(rows, -1)[:, : words_for(columns, bits)]
    return _as_int32(flat).contiguous()


def _pack_bytes(codes: Tensor, bits: int, missing: int) -> Tensor:
    """`pack` of codes that fill bytes, which are then the words of a little-endian machine: a tenth of the time.
    missing: columns up to whole words."""
    rows, columns = codes.shape
    bytes_ = torch.zeros(rows, columns + missing, dtype=torch.uint8, device=codes.device)
    bytes_[:, :columns] = codes
    count = 8 // bits  # codes in a byte; as many bytes are seen as one number
    wide = bytes_.view(_OF_BYTES[count])
    packed = wide
    for position in range(1, count):
        packed = packed | (wide >> position * (8 - bits))
    return packed.to(torch.uint8).view(torch.int32)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [rows, columns], the inverse of `pack`."""
    rows = words.shape[0]
    period, count = _period(bits)
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    missing = -unsigned.shape[1] % count
    if missing:
        unsigned = torch.nn.functional.pad(unsigned, (0, missing))
    chunks = unsigned.view(rows, -1, count)  # [rows, chunks, words]
    codes = torch.empty(rows, chunks.shape[1], period, dtype=torch.uint8, device=words.device)
    for position in range(period):
        word, shift = divmod(position * bits, 32)
        value = chunks[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (chunks[:, :, word + 1] << (32 - shift))
        codes[:, :, position] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :columns].contiguous()


def pack_awq_rows(codes: Tensor) -> Tensor:
    """int32 [columns, rows / 8] for 4-bit codes uint8 [rows, columns], rows divisible by 8: AWQ's words of the codes
    turned."""
    eights = codes.unflatten(0, (-1, 8))  # [rows / 8, 8, columns]
    words = torch.zeros(eights.shape[0], codes.shape[1], dtype=torch.int32, device=codes.device)
    for position, row in enumerate(AWQ_ORDER):
        words |= eights[:, row].to(torch.int32) << 4 * position
    return words.T.contiguous()


def awq_deinterleave(codes: Tensor) -> Tensor:
    """Columns in order again, out of that in which AWQ's words hold them: [rows, columns], columns divisible by 8."""
    rows, columns = codes.shape
    back = [AWQ_ORDER.index(position) for position in range(8)]
    return codes.reshape(rows, columns // 8, 8)[:, :, back].reshape(rows, columns)


def _period(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole words, and how many words that is."""
    common = math.lcm(bits, 32)
    return common // bits, common // 32


def _as_int32(unsigned: Tensor) -> Tensor:
    """int64 values below 2**32 as the int32 with the same bits."""
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)
