"""The quantized tensors that methods make, formats store and readers give back.

One convention everywhere inside the project: `weight = (codes - zero) * scale`, or `codebook[codes] * scale`.
Every other convention is translated in the file of the format that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from quantkit.maths.gram import Importance

BAND = 1 << 17
"""Values that are worked on together on a CPU where each row stands alone: float32 copies of them stay in a core's
cache, which is several times faster than memory, and what a step needs beside its result stays small."""

DEVICE_BAND = 1 << 24
"""The same on other devices, which want few large operations."""


def band_size(tensor: Tensor) -> int:
    """How many values of a tensor to work on together."""
    return BAND if tensor.device.type == "cpu" else DEVICE_BAND


def row_bands(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix [rows, columns], of about `band_size` values each."""
    step = max(1, band_size(matrix) // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))


@dataclass(frozen=True)
class Grid:
    """The set of values a group of weights may take.

    bits: width of a code. group_size: input columns that share a scale; None is the whole row.
    symmetric: the zero is fixed at 2**(bits - 1) and not stored.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    @property
    def levels(self) -> int:
        return 2**self.bits

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` columns has."""
        size = self.group_size or in_features
        return -(-in_features // size)

    def label(self) -> str:
        """A short text for tables, such as "4-bit g128 sym"."""
        size = "row" if self.group_size is None else f"g{self.group_size}"
        return f"{self.bits}-bit {size} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class GroupTensor:
    """A linear weight on an affine grid with one scale a group of input columns.

    codes: uint8 [out, in]. scale: float32 [out, groups], holding values exactly representable in the dtype they are
    stored in; negative where a symmetric group's odd level is wanted on the positive side. zero: uint8 [out, groups],
    None when the grid is symmetric. group_of: int32 [in], the group of each column, None when columns lie in order
    (column j in group j // group_size).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    group_of: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def column_groups(self) -> Tensor:
        """The group of each input column: int64 [in]."""
        if self.group_of is not None:
            return self.group_of.long()
        size = self.grid.group_size or self.shape[1]
        return torch.arange(self.shape[1], device=self.codes.device) // size

    def pieces(self) -> Iterator[Tensor]:
        """The weight these codes stand for, some rows at a time: float32 [rows * in]."""
        middle = torch.full_like(self.scale, 2 ** (self.grid.bits - 1)) if self.zero is None else self.zero.float()
        size = self.grid.group_size or self.shape[1]
        in_order = self.group_of is None and self.shape[1] % size == 0
        columns = None if in_order else self.column_groups()
        for rows in row_bands(self.codes):
            if columns is None:
                codes = self.codes[rows].float().unflatten(1, (-1, size))  # [rows, groups, group_size]
                yield codes.sub_(middle[rows].unsqueeze(2)).mul_(self.scale[rows].unsqueeze(2)).flatten()
            else:
                codes = self.codes[rows].float() - middle[rows][:, columns]
                yield codes.mul_(self.scale[rows][:, columns]).flatten()

    def dequantize(self) -> Tensor:
        """The weight these codes stand for: float32 [out, in]."""
        return _joined(self.pieces(), self.shape, self.codes.device)


@dataclass(frozen=True)
class Int8Rows:
    """LLM.int8 weights: `weight = codes * absmax / 127`, one absmax a row.

    codes: int8 [out, in]. absmax: float32 [out] (bitsandbytes calls it SCB).
    Source: Dettmers et al. 2022, section 2; bitsandbytes' Int8Params.
    """

    codes: Tensor
    absmax: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def pieces(self) -> Iterator[Tensor]:
        """The weight some rows at a time: float32 [rows * in]."""
        scale = (self.absmax.float() / 127.0).unsqueeze(1)
        for rows in row_bands(self.codes):
            yield torch.mul(self.codes[rows], scale[rows]).flatten()

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        return _joined(self.pieces(), self.shape, self.codes.device)


@dataclass(frozen=True)
class CodebookBlocks:
    """NF4 weights as bitsandbytes lays them out: two codes a byte, blocks over the flattened matrix.

    packed: uint8 [out * in / 2, 1], row-major, the even element in the high nibble. absmax: float32 [blocks], or
    uint8 [blocks] when double-quantized. codebook: float32 [16]. block_size: weights a block. nested_*: set when
    absmax is itself quantized: `absmax = nested_codebook[absmax] * nested_absmax[block // nested_block_size] +
    nested_offset`. dtype: the dtype the weight had. Source: Dettmers et al. 2023 (QLoRA), sections 3 and 4.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    block_size: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_codebook: Tensor | None = None
    nested_block_size: int | None = None
    nested_offset: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def block_scale(self) -> Tensor:
        """The scale of each block: float32 [blocks]."""
        if self.nested_absmax is None:
            return self.absmax.float()
        assert self.nested_codebook is not None and self.nested_block_size is not None
        inner = self.nested_codebook.float()[self.absmax.long()]
        outer = self.nested_absmax.float().repeat_interleave(self.nested_block_size)[: inner.numel()]
        return inner * outer + (self.nested_offset or 0.0)

    def pieces(self) -> Iterator[Tensor]:
        """The weight some blocks at a time: float32 [blocks * block_size], the last one perhaps shorter."""
        codebook = self.codebook.float()
        # both values of a byte in one look-up, the high nibble first
        pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)  # [256, 2]
        scale = self.block_scale().unsqueeze(1)
        count = self.out_features * self.in_features
        packed = self.packed.reshape(-1)
        band = max(1, band_size(packed) // (2 * self.block_size)) * 2 * self.block_size  # whole blocks, whole bytes
        for start in range(0, count, band):
            end = min(start + band, count)
            values = embedding(packed[start // 2 : -(-end // 2)].int(), pairs).reshape(-1)
            values = values[: end - start]  # an odd number of weights leaves half a byte
            first, whole = start // self.block_size, (end - start) % self.block_size == 0
            blocks = values if whole else pad(values, (0, -len(values) % self.block_size))
            blocks = blocks.view(-1, self.block_size)
            blocks *= scale[first : first + len(blocks)]
            yield blocks.view(-1)[: end - start]

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        return _joined(self.pieces(), self.shape, self.packed.device)


@dataclass(frozen=True)
class BlockTensor:
    """A tensor in one of ggml's block formats, as the bytes a GGUF file holds.

    data: uint8 [rows, row_bytes]. type_name: ggml's name of the type in upper case, such as "Q4_0". shape: [out, in]
    of the weight. Two-level scales of the K types do not fit GroupTensor, so the bytes are the tensor. importance: of
    the columns, where it was measured to choose the codes.
    """

    data: Tensor
    type_name: str
    out_features: int
    in_features: int
    importance: Importance | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def pieces(self) -> Iterator[Tensor]:
        """The weight some rows at a time: float32 [rows * in]."""
        from quantkit.maths.ggml import COMPILED_BAND, decode

        for data in self.data.split(max(1, COMPILED_BAND // self.in_features)):
            yield decode(data, self.type_name, (len(data), self.in_features)).flatten()

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        from quantkit.maths.ggml import decode

        return decode(self.data, self.type_name, self.shape)


def _joined(pieces: Iterable[Tensor], shape: tuple[int, int], device: torch.device) -> Tensor:
    """Pieces of a weight in order as the whole: float32 [out, in]."""
    weight = torch.empty(shape, device=device)
    for _ in written(pieces, weight):
        pass
    return weight


def written(pieces: Iterable[Tensor], out: Tensor) -> Iterator[Tensor]:
    """Pieces of a weight as they come, each written to its place in `out` [out, in], of any dtype, when it is asked
    for."""
    flat, start = out.view(-1), 0
    for piece in pieces:
        flat[start : start + len(piece)] = piece
        start += len(piece)
        yield piece


QuantizedTensor = GroupTensor | Int8Rows | CodebookBlocks | BlockTensor


def on_cpu(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same quantized tensor with all its parts in host memory."""
    parts = {item.name: getattr(tensor, item.name) for item in fields(tensor)}
    moved: dict[str, Any] = {name: part.cpu() for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(tensor, **moved)


def let_go(tensor: Tensor) -> None:
    """Empty a tensor that others still hold, so that its memory goes back; reading it is an error from then on."""
    tensor.set_()  # type: ignore[call-overload]  # what it holds by default is nothing


StoredTensors = Mapping[str, Tensor]
"""What a format writes for one weight: full tensor names to tensors."""
