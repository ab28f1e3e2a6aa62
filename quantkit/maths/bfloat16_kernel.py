"""Compiled products of bfloat16, summed in float32, by AVX-512's units for them: twice as many as of float32.

One instruction multiplies two neighbours of each lane and adds both products up. So panels are those of
`maths/float_kernel.py` with two numbers, one behind the other along what is summed over, in each word.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types  # type: ignore[import-untyped]
from numba.core import cgutils  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]

from quantkit.maths.float_kernel import TILE_COLUMNS
from quantkit.maths.int_kernel import TILE_ROWS
from quantkit.maths.vectors import data_of, in_all_lanes, pointer_at

PAIR = 2
"""Numbers that are added up by one instruction."""

_LANES = 16
_FLOAT, _SHORT, _INT, _LONG = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SUMS, _WORDS = ir.VectorType(_FLOAT, _LANES), ir.VectorType(_INT, _LANES)


class _BFloat16(ir.Type):  # type: ignore[misc] # which llvmlite has no type for
    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_NUMBERS = ir.VectorType(_BFloat16(), PAIR * _LANES)


def _add_bfloat16(typing_context: Any, left: Any, places: Any, right: Any, depth: Any, sums: Any, step: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, places, right, sums = (
            data_of(context, builder, signature.args[at], args[at], kind)
            for at, kind in ((0, _SHORT), (1, _LONG), (2, _INT), (4, _FLOAT))
        )
        vectors = range(TILE_COLUMNS // _LANES)
        kind = ir.FunctionType(_SUMS, [_SUMS, _NUMBERS, _NUMBERS])
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        none = ir.Constant(_SUMS, [0.0] * _LANES)
        found = [[cgutils.alloca_once_value(builder, none) for _ in vectors] for _ in range(TILE_ROWS)]
        starts = [builder.load(pointer_at(builder, places, row, _LONG)) for row in range(TILE_ROWS)]
        rows = [pointer_at(builder, left, start, _INT) for start in starts]
        pairs = builder.udiv(builder.add(args[3], ir.Constant(_LONG, PAIR - 1)), ir.Constant(_LONG, PAIR))
        with cgutils.for_range(builder, pairs) as loop:
            beside = builder.gep(right, [builder.mul(loop.index, ir.Constant(_LONG, TILE_COLUMNS))])
            numbers = [builder.load(pointer_at(builder, beside, v * _LANES, _NUMBERS), align=4) for v in vectors]
            for row, own in zip(rows, found, strict=True):
                pair = builder.load(builder.gep(row, [loop.index]), align=2)
                pair = builder.bitcast(in_all_lanes(builder, pair, _LANES), _NUMBERS)
                for v in vectors:
                    builder.store(builder.call(multiply, [builder.load(own[v]), pair, numbers[v]]), own[v])
        for row, own in enumerate(found):
            there = builder.gep(sums, [builder.mul(args[5], ir.Constant(_LONG, row))])
            for v in vectors:
                builder.store(builder.load(own[v]), pointer_at(builder, there, v * _LANES, _SUMS), align=4)
        return context.get_dummy_value()

    return types.void(left, places, right, depth, sums, types.intp), generate


add_bfloat16: Any = intrinsic(_add_bfloat16)
"""sums float32 [TILE_ROWS, TILE_COLUMNS] of left times right over `depth` numbers of each; behind an odd number of them
left has one more, which is multiplied as well.

left: an array of the bits of bfloat16; places: int64 [TILE_ROWS], the numbers of it that rows begin at. right: a panel
int32 [pairs, TILE_COLUMNS], the first number of each pair lower. sums: an array, the rows of which begin `step` numbers
apart.
"""
