"""Compiled products of bfloat16, summed in float32, by AVX-512's units for them: twice as many as of float32.

One instruction multiplies two neighbours of each lane and adds both products up. So panels are those of
`maths/float_kernel.py` with two numbers, one behind the other along what is summed over, in each word.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from quantkit.maths.float_kernel import adding

PAIR = 2
"""Numbers that are added up by one instruction."""


class _BFloat16(ir.Type):  # type: ignore[misc] # which llvmlite has no type for
    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_NUMBERS = ir.VectorType(_BFloat16(), PAIR * 16)


add_bfloat16: Any = adding(ir.IntType(16), ir.IntType(32), _NUMBERS, "llvm.x86.avx512bf16.dpbf16ps.512", sum_first=True)
"""sums float32 [TILE_ROWS, TILE_COLUMNS] of left times right over `depth` numbers of each; behind an odd number of them
left has one more, which is multiplied as well.

left: an array of the bits of bfloat16; places: int64 [TILE_ROWS], the numbers of it that rows begin at. right: a panel
int32 [pairs, TILE_COLUMNS], the first number of each pair lower. sums: an array, the rows of which begin `step` numbers
apart.
"""
