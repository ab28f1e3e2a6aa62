"""Products of one row with the columns of a few others, vectors written out: what compilers take seconds to find.

As a plain loop the same has to be unrolled and vectorized by the compiler at each place where it is used, which took
most of the time that the loops of `maths/kernels.py` are compiled in.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types  # type: ignore[import-untyped]
from numba.core import cgutils  # type: ignore[import-untyped]
from numba.core.errors import TypingError  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]

from quantkit.maths.vectors import in_all_lanes, pointer_at

LANES = 64
"""Numbers side by side, as lanes of the vectors: one factor serves all of them."""

WIDTH = 32
"""Lanes that are summed up together: two sums of them are as many chains as the units of a processor are deep, and are
held in registers of 256 bits as well as of 512."""

_LONG, _VECTOR = ir.IntType(64), ir.VectorType(ir.FloatType(), WIDTH)
_FUSED = ("contract",)


def _add_products(typing_context: Any, factors: Any, lanes: Any, sums: Any) -> Any:
    if (factors, lanes, sums) != tuple(types.Array(types.float32, n, "C") for n in (1, 2, 1)):
        raise TypingError(f"add_products takes float32 in one piece, not {factors}, {lanes}, {sums}")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, columns, totals = (context.make_array(signature.args[i])(context, builder, args[i]) for i in range(3))
        count = builder.extract_value(row.shape, 0)
        even, odd = cgutils.alloca_once(builder, _VECTOR), cgutils.alloca_once(builder, _VECTOR)

        def add(total: Any, k: Any, start: Any) -> None:
            factor = in_all_lanes(builder, builder.load(builder.gep(row.data, [k])), WIDTH)
            at = builder.add(builder.mul(k, ir.Constant(_LONG, LANES)), start)
            product = builder.fmul(
                factor,
                builder.load(pointer_at(builder, columns.data, at, _VECTOR), align=4),
                flags=_FUSED,
            )
            builder.store(builder.fadd(builder.load(total), product, flags=_FUSED), total)

        none, one, whole = ir.Constant(_LONG, 0), ir.Constant(_LONG, 1), builder.and_(count, ir.Constant(_LONG, -2))
        ends = ir.Constant(_LONG, LANES), ir.Constant(_LONG, WIDTH)
        with cgutils.for_range_slice(builder, none, *ends) as (start, _):
            builder.store(builder.load(pointer_at(builder, totals.data, start, _VECTOR), align=4), even)
            builder.store(ir.Constant(_VECTOR, [0.0] * WIDTH), odd)
            with cgutils.for_range_slice(builder, none, whole, ir.Constant(_LONG, 2)) as (k, _):
                add(even, k, start)
                add(odd, builder.add(k, one), start)
            with builder.if_then(builder.icmp_signed("<", whole, count)):
                add(even, whole, start)
            sums = builder.fadd(builder.load(even), builder.load(odd))
            builder.store(sums, pointer_at(builder, totals.data, start, _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(factors, lanes, sums), generate


add_products: Any = intrinsic(_add_products)
"""sums [LANES] += factors [n] @ lanes [n, LANES], float32 in one piece: over even and over odd n, each in their order,
so a lane's sum is of one order whatever compiled it."""
