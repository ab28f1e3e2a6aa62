"""Blocks with one absmax each: NF4 codes, the 8-bit codes of their scales, and int8 rows.

Equal to bitsandbytes' processor kernels bit for bit, without importing it: that import takes longer than quantizing a
small model does. Source: bitsandbytes 0.50, backends/default/ops.py (quantize_4bit, int8_vectorwise_quant),
functional.py (create_dynamic_map) and, for the 8-bit codes, what its quantize_blockwise gives on a processor.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from quantkit.maths.compiled import readable
from quantkit.tensors import band_size, row_bands

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The codebook: quantiles of a normal distribution. Source: Dettmers et al. 2023 (QLoRA), appendix E."""

_SMALLEST = 1e-38
"""What a block's absmax counts as at least, so that a block of zeros has a finite inverse."""

_CELLS = 65536
"""Cells of [-1, 1] in the look-up table that 8-bit codes come from."""


def nf4_codes(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(count / 2), 1], two a byte with the first one high, and absmax float32 [blocks] of a weight.

    weight: any shape and float dtype, taken row by row; the last block may be short. An absmax is NaN or infinite where
    its block holds such a value. Computed a band at a time.
    """
    flat = weight.reshape(-1)
    count = flat.numel()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // block_size), device=weight.device)
    band = max(1, band_size(weight) // (2 * block_size)) * 2 * block_size  # whole blocks, whole bytes
    for start in range(0, count, band):
        part = flat[start : start + band].to(torch.float32, copy=True)
        blocks = _whole(part, block_size).view(-1, block_size)
        largest = blocks.abs().amax(dim=1)
        first = start // block_size
        absmax[first : first + len(largest)] = largest
        scaled = blocks.mul_((1.0 / largest.clamp(min=_SMALLEST)).unsqueeze(1)).view(-1)[: len(part)]
        pairs = _nearest_nf4(_whole(scaled, 2)).view(torch.int16)  # the first code of a pair is the low byte
        packed[start // 2 : start // 2 + len(pairs)] = (pairs << 4) | (pairs >> 8)
    return packed.unsqueeze(1), absmax


def _whole(values: Tensor, size: int) -> Tensor:
    """The values [count], followed by zeros up to a multiple of `size`."""
    missing = -len(values) % size
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def nf4_codebook(device: torch.device) -> Tensor:
    """NF4_VALUES as float32 [16]."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def _nearest_nf4(scaled: Tensor) -> Tensor:
    """The code of each value in [-1, 1], the lower one on a tie: float32 [count] to uint8 [count]."""
    if scaled.device.type != "cpu":
        return torch.bucketize(scaled, _nf4_bounds().to(scaled.device), out_int32=True).to(torch.uint8)
    # 15 comparisons of NumPy take a tenth of a binary search: they run in vector registers
    values, codes, above = scaled.numpy(), np.zeros(scaled.shape, np.uint8), np.empty(scaled.shape, np.bool_)
    ones = above.view(np.uint8)
    for bound in _nf4_bounds().numpy():
        np.greater(values, bound, out=above)
        np.add(codes, ones, out=codes)
    return torch.from_numpy(codes)


@cache
def _nf4_bounds() -> Tensor:
    """The values half way between neighbours of the codebook: float32 [15]."""
    codebook = nf4_codebook(torch.device("cpu"))
    return (codebook[:-1] + codebook[1:]) / 2


def nested_codes(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit codes of scales: uint8 [count], their absmax float32 [blocks], codebook float32 [256], offset float32 [].

    absmax: float32 [count]. `absmax = codebook[code] * nested_absmax + offset`, the offset being the mean.
    """
    offset = absmax.mean()
    centred = absmax - offset
    codebook, table = (tensor.to(absmax.device) for tensor in _dynamic_tables())
    count = len(centred)
    blocks = _whole(centred, block_size).view(-1, block_size)
    largest = blocks.abs().amax(dim=1)
    # a block of equal scales gives 0 * inf: the library codes it as 0, whatever that stands for times 0
    scaled = torch.nan_to_num(blocks * (1.0 / largest).unsqueeze(1), nan=-1.0, posinf=1.0, neginf=-1.0)
    cell = (scaled.clamp(-1, 1) + 1) * ((_CELLS - 1) / 2) + 0.5
    return table[cell.long().view(-1)[:count]], largest, codebook.clone(), offset


@cache
def _dynamic_tables() -> tuple[Tensor, Tensor]:
    """The dynamic 8-bit codebook, float32 [256] ascending, and the code nearest to the centre of each cell, uint8."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        power = 10 ** (exponent - 6)
        values += (power * means).tolist() + (-power * means).tolist()
    codebook = torch.tensor(sorted(values), dtype=torch.float32)
    centres = torch.arange(_CELLS, dtype=torch.float32) * 2 / (_CELLS - 1) - 1
    right = torch.searchsorted(codebook, centres).clamp(1, len(codebook) - 1)
    nearer_left = (centres - codebook[right - 1]) <= (codebook[right] - centres)
    return codebook, (right - nearer_left.long()).to(torch.uint8)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in], `round(weight * 127 / absmax)`, and absmax float32 [out] of each row of a weight.

    weight: [out, in], any float dtype; rounded to float16 first. absmax is NaN or infinite where a row holds such a
    value after that. A row of zeros has codes 0.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(len(weight), device=weight.device)
    quantized = _compiled_rows if weight.device.type == "cpu" else _rows_by_tensors
    for rows in row_bands(weight):
        quantized(weight[rows], codes[rows], absmax[rows])
    return codes, absmax


def _compiled_rows(weight: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Rows of a weight into codes and absmax, which are written to."""
    from quantkit.maths.int8_kernel import quantize_rows  # its import takes half a second

    given = weight if weight.dtype == torch.bfloat16 else weight.to(torch.float16)  # bfloat16 is rounded inside
    quantize_rows(readable(given), codes.numpy(), absmax.numpy())


def _rows_by_tensors(weight: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """The same for any device."""
    part = weight.to(torch.float16).float()
    largest = part.abs().amax(dim=1)
    absmax.copy_(largest)
    factor = torch.where(largest > 0, 127.0 / largest, 0.0)
    codes.copy_(part.mul_(factor.unsqueeze(1)).round_())
