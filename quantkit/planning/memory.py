"""How much memory a run will take at most: the libraries, and what the pipeline holds at once, term by term.

The terms follow quantkit/pipeline.py, one_block.py and model/stages.py; each is a named part of the answer, so that a
forecast that is off shows which. What is not in the code is in three constants, measured on whole runs: see
docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.maths.products import BAND_VALUES
from quantkit.memory import room_within
from quantkit.model.room import BlockSizes, left_behind
from quantkit.planning.shapes import Group, Work

LIBRARIES_BYTES = {"plain": 290_000_000, "compiled": 395_000_000, "gguf": 438_000_000, "calibrated": 520_000_000}
"""What a process holds before the first tensor: alone, with compiled loops, with a GGUF file's tokenizer and the
kernels of its types, or with calibration, which takes transformers, a model without weights and the compiled solver.
All but the last hold the parts of a million weights in which what stays unquantized goes through. Of the CPU build of
torch; CUDA_BYTES come on top on a GPU."""

CUDA_BYTES = 600_000_000
"""Host memory of a CUDA context and its libraries: an estimate, not measured here."""

LARGEST_LINEAR_BYTES = {"plain": 9.0, "compiled": 10.0, "gguf": 3.2}
"""Bytes for each weight of the largest linear, as an uncalibrated run holds it: whole, or in parts where the file takes
them."""

RETAINED, RETAINED_BYTES = 0.25, 20_000_000
"""What is kept of freed memory: a part of what is held while a block is rounded and of what was held while scales were
looked for, but so many bytes at most, since more goes back before a new peak (quantkit/memory.py), and under a limit
as many as that has room for. The part stands for what torch keeps on a GPU as well, which was not
measured."""

ROWS = "rows that wait inside a block"

GRAM_BYTES = 6.5
"""Of a Gram matrix that is solved, for each element: itself in float32, with its factor in one half of it, and products
of half of its rows or less while that is made, with panels of what own loops multiply (5 without). Where pivots are too
small for float32, two copies in float64 come on top, which is rare."""

ERROR = 0.15
"""How far a peak was off at most, in parts of it, in the table of docs/plan.md."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes at the peak. host, device: the parts of each by name. scratch_bytes: of files that vanish with the run.
    filed_bytes: what goes to such a file and comes back in every block, for rows that wait without room in memory.
    again: of all rows, the part that starts again for every group of linears."""

    host: dict[str, int]
    device: dict[str, int]
    scratch_bytes: int
    filed_bytes: int = 0
    again: float = 0.0

    @property
    def peak_rss_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def peak_vram_bytes(self) -> int:
        return sum(self.device.values())


def memory_of(
    work: Work, device: torch.device, room_bytes: int, *, limited: bool = False, device_room_bytes: int | None = None
) -> MemoryForecast:
    """The peak of a run.

    room_bytes: half of what the host has free, or where that is `limited` by the user, all that the run may hold.
    Hidden states over a quarter of what is left beside the libraries go to a scratch file. device_room_bytes: half of
    what a GPU has free. Rows that find no room to wait where the blocks run do so in a scratch file, or start again
    where they cannot.
    """
    host = {"libraries": LIBRARIES_BYTES[work.kind]}
    if device.type == "cuda":
        host["CUDA"] = CUDA_BYTES
    if not work.calibrated:
        host["largest linear and its codes"] = int(LARGEST_LINEAR_BYTES[work.kind] * work.largest_linear_values)
        return MemoryForecast(host, {}, 0)
    states = work.tokens * work.hidden * work.how.states.itemsize

    def room_beside(held: int) -> int:
        """Of half of what is free, half of what is taken is missing then."""
        return room_within(room_bytes, held) if limited else max(0, room_bytes - held // 2)

    held = sum(host.values())
    spilled = states > room_beside(held) // 4
    states_held = 0 if spilled else work.ways * states
    room = room_beside(held + work.block_bytes + states_held)
    parts = _block_parts(work, device, limited and device.type == "cpu")
    if device_room_bytes is not None:
        room = device_room_bytes - work.block_bytes // 2
    scratch, filed, again = work.ways * states if spilled else 0, 0, 0.0
    if work.propagates:
        sizes = _sizes(work, device, in_memory=not spilled)
        sequences = work.tokens // work.length
        waiting = sizes.waiting_sequences(sequences, room)
        if waiting:
            parts[ROWS] = waiting * sizes.waiting_bytes
        if file := sizes.file_bytes(sequences - waiting):
            scratch += file
            filed = (sequences - waiting) * sizes.filed_bytes
        else:
            again = 1 - waiting / sequences
    looking = _looking_parts(work)
    kept = int(RETAINED * (sum(parts.values()) + sum(looking.values())))
    parts = max(parts, looking, key=lambda either: sum(either.values()))
    if device.type == "cuda":
        parts["freed, not given back"] = kept
    else:
        kept = min(RETAINED_BYTES, kept)
        if limited:
            kept = min(kept, max(0, room_bytes - held - sum(parts.values()) - states_held))
        parts["freed, not given back"] = kept
    on_device: dict[str, int] = {}
    if device.type == "cuda":
        ahead = 2 * work.block_bytes
        on_device, parts = parts, {"block, read ahead": ahead if limited else int((1 + RETAINED) * ahead)}
    host |= parts
    if not spilled:
        host["hidden states"] = states_held
    return MemoryForecast(host, on_device, scratch, filed, again)


def _sizes(work: Work, device: torch.device, *, in_memory: bool = True) -> BlockSizes:
    """in_memory: whether hidden states lie there."""
    shapes = tuple((group.rows, group.columns) for group in work.groups)
    return BlockSizes(
        shapes=shapes,
        hidden=work.hidden,
        length=work.length,
        heads=work.heads,
        state_bytes=work.how.states.itemsize,
        linear_bytes=work.how.linears.itemsize,
        model_bytes=work.model_bytes,
        rounded_bytes=work.rounded_bytes,
        stored_bytes=work.block_bytes / work.block_values,
        ways=work.ways,
        device=device.type,
        left_behind=left_behind(work.architecture, work.how, device, shapes, work.heads, work.length),
        states_in_memory=in_memory,
    )


def _looking_parts(work: Work) -> dict[str, int]:
    """What is held while scales are looked for, or in one pass inputs, before weights are let go as they are
    rounded."""
    return {
        "block as stored": work.block_bytes,
        "block in the model": int(work.ways * work.block_values * work.model_bytes),
        "Gram matrices": sum(4 * group.columns**2 for group in work.groups),
        "activations of a batch": _sizes(work, torch.device("cpu")).batch_bytes,
    }


def _block_parts(work: Work, device: torch.device, returned: bool) -> dict[str, int]:
    """What is held while a block is rounded, but for rows that wait, on the device that computes.

    returned: what lies between linears is given back before their group is rounded, so the larger of both counts.
    """
    parts = {"codes": work.block_values}
    stored, between = work.block_bytes / work.block_values, _sizes(work, torch.device("cpu")).batch_bytes
    if work.propagates:
        running = work.rounded_bytes + (work.ways - 1) * work.model_bytes
        parts["block in the model"] = int(work.block_values * running)
        # weights as stored behind the group that is rounded; the heaviest one counts
        held = [(int(stored * sum(one.values for one in work.groups[at + 1 :])), at) for at in range(len(work.groups))]
        weights, at = max(held, key=lambda pair: pair[0] + _solve_bytes(work.groups[pair[1]], work, device))
        solved = _solve_bytes(work.groups[at], work, device)
        parts |= {"weights to round": weights, "Gram matrix and weights at hand": solved}
        if returned:
            between = max(0, between - (solved - 4 * work.groups[at].columns ** 2))
    else:
        # the module is empty then, and what lay between its linears serves again
        parts |= {"block as stored": work.block_bytes}
        parts["Gram matrix and weights at hand"] = max(_solve_bytes(group, work, device) for group in work.groups)
        return parts
    return parts | {"activations of a batch": between}


def _solve_bytes(group: Group, work: Work, device: torch.device) -> int:
    """Of one group: the Gram matrix with its factor; the stacked weights and, of a band of rows, what is owed to them
    or their error, and products, or the rounded weights behind that where these do not run as codes. Without
    propagation those of groups as wide or narrower are there, and while a scale is divided out of this one what it is
    divided out of; with the correction its own:
    sums over two halves of the text and of tokens far out, what they are together, a factor, and what is moved by how
    much."""
    columns = group.columns
    narrower = (other for other in work.groups if other is not group and other.columns <= columns)
    others = 0 if work.propagates else sum(4 * other.columns**2 for other in narrower)
    correction = 20 * columns**2 + 24 * group.values if work.corrects else 0
    band = min(group.values, BAND_VALUES) if device.type == "cpu" else group.values
    behind = work.how.linears.itemsize * group.values if work.propagates and not work.run_columns else 0
    rounding = 4 * group.values + max(behind, 8 * band)
    solved = int(GRAM_BYTES * columns**2) + correction + rounding
    return others + (solved if work.propagates else max(solved, 8 * columns**2))
