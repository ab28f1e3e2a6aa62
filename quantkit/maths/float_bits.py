"""The bits of a float32 inside compiled loops, where an array would have to be viewed and the loop be split."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]


def _bits_of(typing_context: Any, value: Any) -> Any:
    return types.int32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


def _from_bits(typing_context: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


bits_of: Any = intrinsic(_bits_of)
"""The bits of a float32 as an int32."""

from_bits: Any = intrinsic(_from_bits)
"""The float32 that an int32's bits are."""
