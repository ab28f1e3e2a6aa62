"""How much memory a run will take at most: the libraries, and what the pipeline holds at once, term by term.

The terms follow quantkit/pipeline.py and model/forward.py; each is a named part of the answer, so that a forecast that
is off shows which. What is not in the code is in three constants, measured on whole runs: see docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.model.forward import BATCH_TOKENS
from quantkit.planning.shapes import Group, Work

LIBRARIES_BYTES = {"plain": 275_000_000, "compiled": 395_000_000, "gguf": 438_000_000, "calibrated": 520_000_000}
"""What a process holds before the first tensor: alone, with compiled loops, with a GGUF file's tokenizer and the
kernels of its types, or with calibration, which takes transformers, a model without weights and the compiled solver.
All but the last hold the parts of a million weights in which what stays unquantized goes through. Of the CPU build of
torch; CUDA_BYTES come on top on a GPU."""

CUDA_BYTES = 600_000_000
"""Host memory of a CUDA context and its libraries: an estimate, not measured here."""

LARGEST_LINEAR_BYTES = {"plain": 9.0, "compiled": 10.0, "gguf": 3.2}
"""Bytes for each weight of the largest linear, as an uncalibrated run holds it: whole, or in parts where the file takes
them."""

RETAINED = 1.25
"""What the C library keeps of freed memory: bytes resident for each that the terms count."""

ERROR = 0.15
"""How far a peak was off at most, in parts of it, in the table of docs/plan.md."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes at the peak. host, device: the parts of each by name. scratch_bytes: of files that vanish with the run."""

    host: dict[str, int]
    device: dict[str, int]
    scratch_bytes: int

    @property
    def peak_rss_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def peak_vram_bytes(self) -> int:
        return sum(self.device.values())


def memory_of(work: Work, device: torch.device, room_bytes: int) -> MemoryForecast:
    """The peak of a run. room_bytes: what the run may take on the host as things stand; hidden states over a quarter of
    it go to a scratch file, and waiting rows over what is left are run again instead."""
    host = {"libraries": LIBRARIES_BYTES[work.kind]}
    if device.type == "cuda":
        host["CUDA"] = CUDA_BYTES
    if not work.calibrated:
        host["largest linear and its codes"] = int(LARGEST_LINEAR_BYTES[work.kind] * work.largest_linear_values)
        return MemoryForecast(host, {}, 0)
    ways = 2 if work.corrects else 1  # the unquantized model runs along
    states = work.tokens * work.hidden * work.state_bytes
    spilled = states > room_bytes // 4
    parts = _block_parts(work)
    if work.propagates:
        rows = ways * work.tokens * (3 * work.hidden + work.widest) * work.state_bytes
        if rows < room_bytes:
            parts["rows that wait inside a block"] = rows
    on_device: dict[str, int] = {}
    if device.type == "cuda":
        on_device, parts = parts, {"block, read ahead": 2 * work.block_bytes}
    host |= {name: int(RETAINED * size) for name, size in parts.items()}
    if not spilled:
        host["hidden states"] = ways * states
    return MemoryForecast(host, on_device, ways * states if spilled else 0)


def _block_parts(work: Work) -> dict[str, int]:
    """What is held while a block is quantized, on the device that computes."""
    values = work.block_values
    inner = max(group.rows for group in work.groups)
    return {
        "block as stored": work.block_bytes,
        "block in the model": (2 if work.corrects else 1) * values * (work.linear_bytes + work.eight_bit_linears),
        "block in float32": 4 * values,
        "codes": values,
        "Gram matrix and its factor": max(_solve_bytes(group, work) for group in work.groups),
        "activations of a batch": 4 * BATCH_TOKENS["cpu"] * (4 * work.hidden + 2 * inner),
    }


def _solve_bytes(group: Group, work: Work) -> int:
    """Of one group: the Gram matrix in float32, then, while it is factored, two copies in float64; later a damped one.
    Beside that the stacked weights, their error and their gradient. Without propagation every group's Gram is there,
    with the correction its own: sums over two halves of the text and of tokens far out, what they are together, a
    factor."""
    columns = group.columns
    others = 0 if work.propagates else sum(4 * other.columns**2 for other in work.groups if other is not group)
    correction = 20 * columns**2 if work.corrects else 0
    return 20 * columns**2 + correction + 3 * 4 * group.values + others
