"""ggml's block codecs: rows of weights to the bytes a GGUF file holds, and back.

A type cuts each row into blocks and stores a block as a few float16 numbers followed by packed codes. `CODECS` holds
the types that are plain tensor operations, both ways. The codes of the K and IQ types are searched for by loops that
are compiled for the CPU, and so are the plain ones' where the importance of columns is known. gguf-py decodes what is
encoded nowhere here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.tensors import row_bands

HALF_BYTES = 2


@dataclass(frozen=True)
class Codec:
    """One block type: `encode` maps float32 [blocks, block] to uint8 [blocks, bytes], `decode` maps back."""

    block: int  # weights a block
    bytes: int  # bytes a block
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def encode(weight: Tensor, type_name: str, importance: Tensor | None = None) -> Tensor:
    """The bytes of a matrix in one of ggml's types: [rows, columns] of any float dtype to uint8 [rows, row_bytes].

    type_name: upper case, such as "Q4_0". importance: float32 [columns], how much the squared error of a column counts,
    such as the mean of its inputs' squares; Q8_0 and the float types take no notice of it. Equal byte for byte to
    ggml_quantize_chunk. Raises ModelError when the type cannot be encoded, its block does not divide the columns, or
    finite values overflow its float16. Source: llama.cpp, ggml/src/ggml-quants.c.
    """
    if type_name not in ENCODABLE:
        raise ModelError(f"ggml type {type_name}: cannot be encoded; expected one of {', '.join(ENCODABLE)}")
    data = torch.empty(len(weight), type_size(type_name, weight.shape[1]), dtype=torch.uint8, device=weight.device)
    compiled = type_name in SEARCHED or (importance is not None and type_name in WEIGHTED)
    compiled = compiled or (type_name not in FLOAT_TYPES and weight.device.type == "cpu")
    bands = list(row_bands(weight))
    if compiled and weight.numel():
        step = max(1, COMPILED_BAND // weight.shape[1])
        bands = [slice(start, start + step) for start in range(0, len(weight), step)]
    block, _ = block_layout(type_name)
    for band in bands:
        blocks = weight[band].float().reshape(-1, block)  # [blocks, block]
        if compiled:
            _compiled(blocks, type_name, importance, data[band])
        else:
            data[band] = CODECS[type_name].encode(blocks).reshape(-1, data.shape[1])
        _check_overflow(blocks, data[band], type_name)
    return data


def _check_overflow(blocks: Tensor, coded: Tensor, type_name: str) -> None:
    """Raises ModelError where finite weights [blocks, block] have become bytes that stand for others."""
    if not blocks.numel():
        return
    if type_name in _LEADING_HALVES:
        # a byte of each float16 is read instead of every weight: where its exponent is full, it is not finite
        upper = coded.view(len(blocks), -1)[:, 1 : 2 * _LEADING_HALVES[type_name] : 2]
        if not bool((upper & 0x7C == 0x7C).any()):
            return
    largest = max(float(end.abs()) for end in blocks.aminmax())
    if largest > torch.finfo(torch.float16).max and not _finite(coded, type_name, tuple(blocks.shape)):
        raise ModelError(f"values up to {largest:.3g} overflow the float16 of ggml type {type_name}")


def _compiled(blocks: Tensor, type_name: str, importance: Tensor | None, out: Tensor) -> None:
    """Encode float32 [blocks, block] by the compiled loops, which run on the CPU, into uint8 [rows, row_bytes]."""
    import numpy as np

    from quantkit.maths import ggml_iq4, ggml_k, ggml_plain, ggml_weighted

    columns, values = blocks.shape[1], blocks.cpu().contiguous().numpy()
    if type_name not in SEARCHED and (importance is None or type_name not in WEIGHTED):
        ggml_plain.ENCODERS[type_name](values, out.numpy().reshape(len(values), -1))
        return
    weights = np.empty((0, columns), np.float32)
    if importance is not None:
        weights = importance.float().cpu().contiguous().numpy().reshape(-1, columns)
    encoders = {**ggml_k.ENCODERS, **ggml_iq4.ENCODERS, **ggml_weighted.ENCODERS}
    coded = encoders[type_name](values, weights)
    out.copy_(torch.from_numpy(coded).view(out.shape))


def decode(data: Tensor, type_name: str, shape: tuple[int, ...]) -> Tensor:
    """The weights that bytes stand for: uint8 [rows, row_bytes] to float32 of `shape`, whose last axis is the row.

    Raises ModelError when the type is unknown, or the number of bytes does not match the shape.
    """
    count = 1
    for size in shape[:-1]:
        count *= size
    expected = count * type_size(type_name, shape[-1])
    if data.numel() != expected:
        raise ModelError(f"ggml type {type_name} of shape {tuple(shape)} takes {expected} bytes, got {data.numel()}")
    if type_name in SEARCHED:
        return _decode_searched(data, type_name, shape)
    codec = CODECS.get(type_name)
    if codec is None:
        return _decode_with_gguf(data, type_name, shape)
    blocks = data.reshape(-1, codec.bytes)
    values = torch.empty(len(blocks), codec.block, device=data.device)
    for band in row_bands(values):
        values[band] = codec.decode(blocks[band])
    return values.reshape(shape)


def type_size(type_name: str, columns: int) -> int:
    """Bytes that a row of `columns` weights takes.

    Raises ModelError when the type is unknown or its block does not divide the row.
    """
    block, block_bytes = block_layout(type_name)
    if columns % block:
        raise ModelError(f"ggml type {type_name}: its block of {block} does not divide a row of {columns} weights")
    return columns // block * block_bytes


def block_layout(type_name: str) -> tuple[int, int]:
    """Weights a block and bytes a block of any type that can be read. Raises ModelError when it is unknown."""
    codec = CODECS.get(type_name)
    if codec is not None:
        return codec.block, codec.bytes
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    except KeyError as error:
        raise ModelError(f"ggml type {type_name}: unknown") from error
    return int(block), int(block_bytes)


def _decode_searched(data: Tensor, type_name: str, shape: tuple[int, ...]) -> Tensor:
    from quantkit.maths.ggml_decode import DECODERS

    block, block_bytes = block_layout(type_name)
    values = torch.empty(data.numel() // block_bytes, block)
    DECODERS[type_name](data.cpu().contiguous().view(-1, block_bytes).numpy(), values.numpy())
    return values.to(data.device).reshape(shape)


def _finite(data: Tensor, type_name: str, shape: tuple[int, ...]) -> bool:
    return bool(torch.isfinite(decode(data, type_name, shape)).all())


def _decode_with_gguf(data: Tensor, type_name: str, shape: tuple[int, ...]) -> Tensor:
    import gguf
    import numpy as np

    try:
        with np.errstate(invalid="ignore"):  # an infinite scale is for the caller to find
            values = gguf.dequantize(data.cpu().contiguous().numpy(), gguf.GGMLQuantizationType[type_name])
    except NotImplementedError as error:
        message = f"ggml type {type_name}: has no decoder here"
        raise ModelError(message, hint="take the model in another type") from error
    return torch.from_numpy(values).to(data.device).reshape(shape)


def _half_bytes(values: Tensor) -> Tensor:
    """float32 [blocks, 1] to the bytes of its float16: uint8 [blocks, 2]."""
    return values.half().view(torch.uint8)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block as float32 [blocks, 1]."""
    return blocks[:, start : start + HALF_BYTES].contiguous().view(torch.float16).float()


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, torch.zeros_like(scale), torch.ones_like(scale) / scale)


def _truncate(values: Tensor, largest: int) -> Tensor:
    """Codes uint8 by truncation, at most `largest`.

    A scale so small that its reciprocal is infinite leaves values that are not finite; the conversion of the reference
    implementation's processor makes them 0.
    """
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).to(torch.int32).clamp_(0, largest).to(torch.uint8)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Codes uint8 [blocks, block] to uint8 [blocks, block / 2]: byte j holds code j low and code j + block / 2 high."""
    low, high = codes.chunk(2, dim=1)
    return (low & 0x0F) | ((high & 0x0F) << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `_pack_nibbles`, low four bits only."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=1)


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of 32 codes as a little-endian word: uint8 [blocks, 32] to uint8 [blocks, 4]; bit i is code i's."""
    bits = (codes >> 4).reshape(-1, 4, 8)  # [blocks, byte, bit]
    weights = 1 << torch.arange(8, device=codes.device, dtype=torch.uint8)
    return (bits * weights).sum(dim=2, dtype=torch.uint8)


def _unpack_fifth_bits(packed: Tensor) -> Tensor:
    """The inverse of `_pack_fifth_bits`: uint8 [blocks, 4] to uint8 [blocks, 32] of 0 or 16."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (((packed[:, :, None] >> shifts) & 1) << 4).reshape(packed.shape[0], 32)


def _encode_symmetric(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale [blocks, 1] and codes [blocks, block] of Q4_0 and Q5_0.

    The value of largest magnitude, the first on a tie, lies on the lowest code, so the scale carries its sign.
    """
    half_range = 2 ** (bits - 1)
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) + 0.0  # a zero loses its sign
    scale = largest / -half_range  # a power of two: exact on any device
    return scale, _truncate(blocks * _reciprocal(scale) + (half_range + 0.5), 2 * half_range - 1)


def _encode_affine(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale [blocks, 1], minimum [blocks, 1] and codes [blocks, block] of Q4_1 and Q5_1."""
    top = 2**bits - 1
    minimum, maximum = blocks.aminmax(dim=1, keepdim=True)
    # a tensor on the device: a Python number may be divided by as a product with its rounded reciprocal
    scale = (maximum - minimum) / blocks.new_tensor(float(top))
    return scale, minimum, _truncate((blocks - minimum) * _reciprocal(scale) + 0.5, top)


def _encode_q4_0(blocks: Tensor) -> Tensor:
    scale, codes = _encode_symmetric(blocks, 4)
    return torch.cat((_half_bytes(scale), _pack_nibbles(codes)), dim=1)


def _decode_q4_0(data: Tensor) -> Tensor:
    return _half(data, 0) * (_unpack_nibbles(data[:, 2:]).float() - 8)


def _encode_q4_1(blocks: Tensor) -> Tensor:
    scale, minimum, codes = _encode_affine(blocks, 4)
    return torch.cat((_half_bytes(scale), _half_bytes(minimum), _pack_nibbles(codes)), dim=1)


def _decode_q4_1(data: Tensor) -> Tensor:
    return _half(data, 0) * _unpack_nibbles(data[:, 4:]).float() + _half(data, 2)


def _encode_q5_0(blocks: Tensor) -> Tensor:
    scale, codes = _encode_symmetric(blocks, 5)
    return torch.cat((_half_bytes(scale), _pack_fifth_bits(codes), _pack_nibbles(codes)), dim=1)


def _decode_q5_0(data: Tensor) -> Tensor:
    codes = _unpack_nibbles(data[:, 6:]) | _unpack_fifth_bits(data[:, 2:6])
    return _half(data, 0) * (codes.float() - 16)


def _encode_q5_1(blocks: Tensor) -> Tensor:
    scale, minimum, codes = _encode_affine(blocks, 5)
    parts = (_half_bytes(scale), _half_bytes(minimum), _pack_fifth_bits(codes), _pack_nibbles(codes))
    return torch.cat(parts, dim=1)


def _decode_q5_1(data: Tensor) -> Tensor:
    codes = _unpack_nibbles(data[:, 8:]) | _unpack_fifth_bits(data[:, 4:8])
    return _half(data, 0) * codes.float() + _half(data, 2)


def _encode_q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(dim=1, keepdim=True) / blocks.new_tensor(127.0)
    values = torch.nan_to_num(blocks * _reciprocal(scale), nan=0.0, posinf=0.0, neginf=0.0)
    whole = values.trunc()
    # halves go away from zero, as roundf does; torch.round takes them to even
    codes = whole + (values - whole).abs().ge(0.5) * values.sign()
    return torch.cat((_half_bytes(scale), codes.to(torch.int8).view(torch.uint8)), dim=1)


def _decode_q8_0(data: Tensor) -> Tensor:
    return _half(data, 0) * data[:, 2:].view(torch.int8).float()


def _plain(dtype: torch.dtype, size: int) -> Codec:
    """A type that is a float dtype: blocks of one weight."""
    return Codec(
        block=1,
        bytes=size,
        encode=lambda blocks: blocks.to(dtype).view(torch.uint8),
        decode=lambda data: data.contiguous().view(dtype).float(),
    )


CODECS: dict[str, Codec] = {
    "F32": _plain(torch.float32, 4),
    "F16": _plain(torch.float16, 2),
    "BF16": _plain(torch.bfloat16, 2),
    "Q8_0": Codec(32, 2 + 32, _encode_q8_0, _decode_q8_0),
    "Q4_0": Codec(32, 2 + 16, _encode_q4_0, _decode_q4_0),
    "Q4_1": Codec(32, 2 + 2 + 16, _encode_q4_1, _decode_q4_1),
    "Q5_0": Codec(32, 2 + 4 + 16, _encode_q5_0, _decode_q5_0),
    "Q5_1": Codec(32, 2 + 2 + 4 + 16, _encode_q5_1, _decode_q5_1),
}
"""The types that tensor operations encode and decode."""

_LEADING_HALVES = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2, "Q5_0": 1, "Q5_1": 2}
"""Float16 numbers that a block begins with, where it has no others."""

WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Plain types whose scales are searched for where the importance of the columns is known."""

SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types whose scales are always searched for."""

COMPILED_BAND = 1 << 20
"""Weights that go through the compiled loops at once: enough for every core, few enough that the float32 copy of them
stays small beside the matrix."""

ENCODABLE = (*CODECS, *SEARCHED)
"""Every type that `encode` knows."""

FLOAT_TYPES = ("F32", "F16", "BF16")
"""The types that are not quantized."""

HALF_PLACES: dict[str, tuple[int, ...]] = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Bytes of a block at which its float16 scales and minima begin. Source: llama.cpp, ggml/src/ggml-common.h."""
