"""What the intrinsics of compiled loops have in common: pieces of LLVM's code, which numba compiles in place."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

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
