"""What the intrinsics of compiled loops have in common: pieces of LLVM's code, which numba compiles in place."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types  # type: ignore[import-untyped]
from numba.core.errors import TypingError  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]

_INT, _LONG = ir.IntType(32), ir.IntType(64)


def data_of(context: Any, builder: Any, array: Any, value: Any, kind: Any) -> Any:
    """A pointer to the first element of `value`, an argument of numba's type `array`, as one of `kind`."""
    return builder.bitcast(context.make_array(array)(context, builder, value).data, kind.as_pointer())


def pointer_at(builder: Any, start: Any, offset: Any, kind: Any) -> Any:
    """A pointer to one of `kind`, so many elements behind `start`: a number, or one that the code computes."""
    at = ir.Constant(_LONG, offset) if isinstance(offset, int) else offset
    return builder.bitcast(builder.gep(start, [at]), kind.as_pointer())


def in_all_lanes(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of so many times the same number."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    lane_0 = ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(nothing, value, ir.Constant(_INT, 0)), nothing, lane_0)


SQUARE = 8
"""Rows and columns that `turn_square` turns together: as many registers as every processor with vectors has."""


def _turn_square(typing_context: Any, source: Any, begin: Any, step: Any, target: Any, there: Any, apart: Any) -> Any:
    if source.dtype != target.dtype:
        raise TypingError(f"turn_square: {source.dtype} is not {target.dtype}")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number_type = signature.args[0].dtype
        kind, size = context.get_value_type(number_type), number_type.bitwidth // 8
        vector, places = ir.VectorType(kind, SQUARE), ir.VectorType(_INT, SQUARE)

        def row(at: int, number: int) -> Any:
            start = data_of(context, builder, signature.args[at], args[at], kind)
            first = builder.add(args[at + 1], builder.mul(args[at + 2], ir.Constant(_LONG, number)))
            return pointer_at(builder, start, first, vector)

        rows = [builder.load(row(0, number), align=size) for number in range(SQUARE)]
        width = SQUARE // 2
        while width:  # squares of this width above the diagonal change places with those below it
            upper = [at + SQUARE - width if at & width else at for at in range(SQUARE)]
            lower = [at + SQUARE if at & width else at + width for at in range(SQUARE)]
            for one in range(SQUARE):
                if not one & width:
                    pair = rows[one], rows[one + width]
                    for number, chosen in ((one, upper), (one + width, lower)):
                        rows[number] = builder.shuffle_vector(*pair, ir.Constant(places, chosen))
            width //= 2
        for number, turned in enumerate(rows):
            builder.store(turned, row(3, number), align=size)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


turn_square: Any = intrinsic(_turn_square)
"""Write a square of SQUARE rows and columns, turned, from one array to another of the same dtype: (source, begin, step,
target, begin, step). begin, step: the element, of all of an array in one piece, that the square begins at, and how many
its rows lie apart. Source and target may be one array where the squares share no element."""
