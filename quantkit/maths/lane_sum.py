"""A sum in one order, whatever compiled it.

A plain loop over float32 is vectorized only where its sum may be reordered, and then the order is the compiler's: other
vectors give another sum, and so does a second pass of optimization, which code from the cache has had. The vectors here
are written out, for loops that are compiled without `reassoc`: what a loop allows, it allows here as well.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types  # type: ignore[import-untyped]
from numba.core import cgutils  # type: ignore[import-untyped]
from numba.core.errors import TypingError  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]

WIDTHS = (64, 8, 1)
"""Numbers that are added side by side: as many as fit, then what is left of them."""


def _sum_of_vectors(builder: Any, data: Any, start: Any, end: Any, width: int) -> Any:
    """The sum of data[start:end], whose size is a multiple of width: lane by lane, then the halves of the lanes."""
    vector = ir.VectorType(ir.FloatType(), width)
    lanes = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * width))
    with cgutils.for_range_slice(builder, start, end, ir.Constant(start.type, width)) as (at, _):
        place = builder.bitcast(builder.gep(data, [at]), vector.as_pointer())
        builder.store(builder.fadd(builder.load(lanes), builder.load(place, align=4)), lanes)
    found = builder.load(lanes)
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(ir.IntType(32), width), [*range(i, i + width)]) for i in (0, width))
        found = builder.fadd(builder.shuffle_vector(found, found, low), builder.shuffle_vector(found, found, high))
    return builder.extract_element(found, ir.Constant(ir.IntType(32), 0))


def _lane_sum(typing_context: Any, values: Any) -> Any:
    if values != types.Array(types.float32, 1, "C"):
        raise TypingError(f"lane_sum takes float32 in one piece, not {values}")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        size = builder.extract_value(array.shape, 0)
        total, start = ir.Constant(ir.FloatType(), 0.0), ir.Constant(size.type, 0)
        for width in WIDTHS:
            left = builder.urem(size, ir.Constant(size.type, width))
            end = builder.sub(size, left)
            total = builder.fadd(total, _sum_of_vectors(builder, array.data, start, end, width))
            start = end
        return total

    return types.float32(values), generate


lane_sum: Any = intrinsic(_lane_sum)
"""The sum of a float32 array [n] in one piece: 64 partial sums, halves added to halves, and so for what is left."""
