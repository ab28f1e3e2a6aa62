"""Where to compute: one word of the command line becomes a torch device and the dtype that runs best there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu" or "cuda". Raises MissingDependencyError when a GPU is asked for and none is
    there."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f'--device: found "{name}", expected auto, cpu or cuda')
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            "--device cuda: this torch sees no CUDA device",
            hint="use --device cpu, or install a CUDA build of torch on a machine with an NVIDIA GPU",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Arithmetic:
    """In what a model is run for its statistics.

    states: dtype of the hidden states and norms. linears: dtype that the linears multiply in, and the attention its
    weights and values, where loops of our own do it (maths/attention.py) queries and keys too. eight_bit_gram:
    whether Gram matrices are summed from 8-bit integers (maths/gram.py) instead of float32. eight_bit_linears:
    whether linears multiply 8-bit integers (maths/eight_bit.py) where that is near enough. four_bit_linears: whether
    those that were rounded to at most 4 bits multiply by their codes (maths/four_bit.py), as far as that is.
    """

    states: torch.dtype
    linears: torch.dtype
    eight_bit_gram: bool
    eight_bit_linears: bool
    four_bit_linears: bool = False

    @property
    def rounded(self) -> bool:
        """Whether linears multiply in less than the hidden states have."""
        return self.linears != self.states or self.eight_bit_linears

    def compiled_on(self, device: torch.device) -> bool:
        """Whether a model attends, normalizes, gates and turns positions by compiled loops of our own."""
        return self.rounded and device.type == "cpu"

    def label(self) -> str:
        """A short text for a manifest, such as "linears int8 or bfloat16, Gram int8"."""
        integers = "int4, int8 or " if self.four_bit_linears else "int8 or " if self.eight_bit_linears else ""
        linears = integers + str(self.linears).removeprefix("torch.")
        return f"linears {linears}, Gram {'int8' if self.eight_bit_gram else 'float32'}"


def arithmetic(device: torch.device, source_dtype: torch.dtype, *, exact: bool = False) -> Arithmetic:
    """What runs best on a device without a loss that shows in the result; docs/quality.md has the measurements.

    On a CPU the hidden states stay float32, and products take what the processor is fastest at. Elsewhere all is in the
    checkpoint's own half precision. exact: float32 throughout.
    """
    import torch

    half = source_dtype in (torch.float16, torch.bfloat16)
    if exact:
        return Arithmetic(torch.float32, torch.float32, False, False)
    if device.type != "cpu":
        dtype = source_dtype if half else torch.float32
        return Arithmetic(dtype, dtype, False, False)
    linears = torch.bfloat16 if half and multiplies_bfloat16() else torch.float32
    integers = multiplies_integers()
    eight_bit_linears = half and integers
    return Arithmetic(torch.float32, linears, integers, eight_bit_linears, eight_bit_linears and not has_int8_units())


def multiplies_bfloat16() -> bool:
    """Whether the processor has units for products of bfloat16; without them such products are slower than float32."""
    return _can("amx_bf16", "avx512_bf16")


def has_int8_units() -> bool:
    """Whether the processor has units for products of 8-bit integers, four times as fast as float32."""
    return _can("amx_int8", "avx512_vnni")


def multiplies_integers() -> bool:
    """Whether products of 8-bit integers are faster than those of float32: by units for them, or by AVX2's pairs of 16
    bits (`maths/int_kernel.py`) where there is no AVX-512, whose float32 products are as fast as those."""
    return has_int8_units() or (has_avx2() and not has_avx512())


def has_avx2() -> bool:
    """Whether the processor has vectors of 256 bits for integers, and compiled loops may use them: numba can be told to
    do without, and to ask for what it then has not ends the process."""
    return _can("avx2") and _loops_may()


def multiplies_quads() -> bool:
    """Whether compiled loops may use AVX-512's units for products of 8-bit integers (`maths/quads_kernel.py`). Where
    there are matrix units besides, those of torch are left to it."""
    return _can("avx512_vnni") and not _can("amx_int8") and _loops_may()


def multiplies_wide_floats() -> bool:
    """Whether compiled loops may multiply float32 in vectors of 512 bits (`maths/float_kernel.py`)."""
    return has_avx512() and _loops_may()


def multiplies_wide_bfloat16() -> bool:
    """Whether compiled loops may use AVX-512's units for products of bfloat16 (`maths/bfloat16_kernel.py`). Where there
    are matrix units besides, those of torch are left to it."""
    return _can("avx512_bf16") and not _can("amx_bf16") and _loops_may()


def _loops_may() -> bool:
    """Whether numba compiles, and for the processor as it is."""
    told = any(name in os.environ for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"))
    switches = {"NUMBA_ENABLE_AVX": "1", "NUMBA_DISABLE_JIT": "0"}
    return not told and all(os.environ.get(name, usual) == usual for name, usual in switches.items())


def has_avx512() -> bool:
    """Whether the processor has vectors of 512 bits."""
    return _can("avx512_f")


def _can(*capabilities: str) -> bool:
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in capabilities)
