"""The bits of a float32 inside compiled loops, where an array would have to be viewed and the loop be split."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types  # type: ignore[import-untyped]
from numba.extending import intrinsic, overload  # type: ignore[import-untyped]


def _bits_of(typing_context: Any, value: Any) -> Any:
    return types.int32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


def _from_bits(typing_context: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


bits_of: Any = intrinsic(_bits_of)
"""The bits of a float32 as an int32."""

from_bits: Any = intrinsic(_from_bits)
"""The float32 that an int32's bits are."""


MAGNITUDE = np.int32(0x7FFFFFFF)
"""The bits of a float32 without its sign."""


def value_of(number):  # type: ignore[no-untyped-def] # numba wants it to be annotated like the one below
    """A float32, from itself or from the bits of a bfloat16, which numpy has no type for."""


@overload(value_of, inline="always")  # type: ignore[untyped-decorator]
def _value_of(number):  # type: ignore[no-untyped-def]
    if isinstance(number, types.Integer):
        return lambda number: from_bits(np.int32(number) << np.int32(16))
    return lambda number: number


def stored_as(value, like):  # type: ignore[no-untyped-def]
    """A float32, as what a number like the other one holds: itself, or the bits of a bfloat16, rounded half to even."""


@overload(stored_as, inline="always")  # type: ignore[untyped-decorator]
def _stored_as(value, like):  # type: ignore[no-untyped-def]
    if isinstance(like, types.Integer):
        return lambda value, like: np.uint16(
            (bits_of(value) + np.int32(0x7FFF) + ((bits_of(value) >> np.int32(16)) & np.int32(1))) >> np.int32(16)
        )
    return lambda value, like: value


LEAST_POWER = np.float32(-126.0)
"""The least power of two that is told from zero: float32's smallest normal number."""

MOST_POWER = np.float32(127.0)
"""The largest whole one that is told from infinity."""


@njit(inline="always")  # type: ignore[untyped-decorator]
def power_of_two(power: np.float32) -> np.float32:
    """2^power from the least to the most of the above, within 3e-7 of it; outside of them that of the nearer one. A
    polynomial in plain multiplications, so that a loop over it is vectorized."""
    power = LEAST_POWER if power < LEAST_POWER else power
    power = MOST_POWER if power > MOST_POWER else power
    whole = np.floor(power)
    part = power - whole
    # 2^part on [0, 1), fitted for the least relative error
    value = np.float32(1.8775767e-3)
    value = value * part + np.float32(8.9893397e-3)
    value = value * part + np.float32(5.5826318e-2)
    value = value * part + np.float32(2.4015361e-1)
    value = value * part + np.float32(6.9315308e-1)
    value = value * part + np.float32(9.9999994e-1)
    return from_bits(bits_of(value) + (np.int32(whole) << np.int32(23)))
