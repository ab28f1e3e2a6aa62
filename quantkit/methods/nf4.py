"""NF4 (QLoRA): 4-bit codes into the quantiles of a normal distribution, one absmax a block of 64 weights.

Source: Dettmers et al. 2023, sections 3 and 4; bitsandbytes' quantize_4bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from quantkit.maths.blockwise import nested_codes, nf4_codebook, nf4_codes
from quantkit.maths.gram import InputStatistics
from quantkit.methods.base import BlockResult, BlockWeights, Method, check_finite
from quantkit.tensors import CodebookBlocks

NESTED_BLOCK_SIZE = 256
"""Scales that share a scale of their own; fixed in bitsandbytes."""

_CODEBOOK_BYTES = 16 * 4
_NESTED_CODEBOOK_BYTES = 256 * 4
_OFFSET_DIGITS = 22
"""Of a float32 mean as Python writes it, at most; the format fills up with blanks."""


def _state_bytes(block_size: int, out_features: int, in_features: int, double_quant: bool) -> int:
    """Length of the JSON text that the format stores beside a weight."""
    text = f'{{"quant_type": "nf4", "blocksize": {block_size}, "dtype": "float16", '
    text += f'"shape": [{out_features}, {in_features}]}}'
    if not double_quant:
        return len(text)
    nested = f', "nested_blocksize": {NESTED_BLOCK_SIZE}, "nested_dtype": "float32", "nested_offset": '
    return len(text) + len(nested) + _OFFSET_DIGITS


def quantize_nf4(weight: Tensor, block_size: int, double_quant: bool) -> CodebookBlocks:
    """Codes and scales of a float weight [out, in], on its device: those that bitsandbytes gives on a processor.

    Blocks run over the rows laid end to end. An absmax is not finite where its block is not.
    """
    packed, absmax = nf4_codes(weight, block_size)  # [out * in / 2, 1], [blocks]
    out_features, in_features = weight.shape
    plain = CodebookBlocks(
        packed, absmax, nf4_codebook(weight.device), block_size, out_features, in_features, weight.dtype
    )
    if not double_quant:
        return plain
    codes, nested_absmax, nested_codebook, offset = nested_codes(absmax, NESTED_BLOCK_SIZE)
    return replace(
        plain,
        absmax=codes,
        nested_absmax=nested_absmax,
        nested_codebook=nested_codebook,
        nested_block_size=NESTED_BLOCK_SIZE,
        nested_offset=float(offset),
    )


class NF4(Method):
    """Blocks of 4-bit codes with a float32 scale each, or an 8-bit one when double-quantized.

    A block must not straddle two rows: bitsandbytes 0.50 decodes such rows wrongly, without an error, on processors
    with AVX-512. On those with AVX512-BF16 it also refuses linears whose out_features is not a multiple of 32.
    """

    name: Literal["nf4"] = "nf4"
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="weights that share a scale")
    double_quant: bool = Field(True, description="quantize the blocks' absmax to 8 bits as well")
    compute_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="of the reader's products")

    def label(self) -> str:
        size = "" if self.block_size == 64 else f" g{self.block_size}"
        return f"nf4{size}{' double-quant' if self.double_quant else ''}"

    def misfit(self, out_features: int, in_features: int) -> str | None:
        if in_features % self.block_size == 0:
            return None
        remedy = "; block_size 32 divides it" if in_features % 32 == 0 else ""
        return (
            f"block_size {self.block_size} does not divide in_features {in_features}{remedy} "
            "(bitsandbytes decodes blocks that straddle rows wrongly on some processors)"
        )

    def predicted_bits(self, out_features: int, in_features: int) -> float:
        count = out_features * in_features
        blocks = count // self.block_size
        stored = count // 2 + _CODEBOOK_BYTES
        stored += _state_bytes(self.block_size, out_features, in_features, self.double_quant)
        if self.double_quant:
            stored += blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + _NESTED_CODEBOOK_BYTES
        else:
            stored += 4 * blocks
        return stored * 8 / count

    def quantize_block(self, given: BlockWeights, statistics: dict[str, InputStatistics]) -> BlockResult:
        quantized = {}
        for name, weight in given.weights.items():
            check_finite(f"{name}.weight", weight)
            quantized[name] = quantize_nf4(weight, self.block_size, self.double_quant)
        return BlockResult(quantized, dict.fromkeys(quantized, self.label()))
