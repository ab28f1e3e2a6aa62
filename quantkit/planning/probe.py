"""How fast this machine is, in under a second: products in three dtypes, reading and writing; kept for next time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from quantkit.environment import cpu_model
from quantkit.manifest import write_atomic
from quantkit.resources import cache_folder

VERSION = 4
"""Raised when the measurements change, so that kept ones are made again."""

GEMM_SIDE = 1536
"""Rows and columns of the products: large enough to be bound by arithmetic, 7 GFLOP each."""

REPETITIONS = 4
"""Of each product; the fastest counts, since what disturbs a measurement makes it slower."""

FILE_BYTES = 32 << 20
STEP_BYTES = 1 << 20


class Probe(BaseModel):
    """Rates of one machine. identity: what it was measured on; another one is measured again.

    float32_flop_s, bfloat16_flop_s, int8_op_s: of matrix products on the processor as the engine multiplies;
    int8_op_s is 0 where 8-bit products are not used. device_flop_s: of half-precision products on the GPU.
    read_bytes_s, write_bytes_s: of a file, the page cache dropped before and the disk waited for.
    """

    version: int = VERSION
    identity: dict[str, str | int | None]
    measured: str
    float32_flop_s: float
    bfloat16_flop_s: float
    int8_op_s: float
    device_flop_s: float | None
    read_bytes_s: float
    write_bytes_s: float


def machine_identity(device: str) -> dict[str, str | int | None]:
    """What the rates depend on: the processor, the threads, the build of torch, the GPU."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def probe(device: str = "cpu", *, again: bool = False) -> Probe:
    """The rates of this machine: those kept in the user's cache, or measured now. again: measure in any case."""
    identity = machine_identity(device)
    path = cache_folder() / f"probe-{device}.json"
    if not again:
        with suppress(OSError, ValidationError):
            kept = Probe.model_validate_json(path.read_bytes())
            if kept.identity == identity and kept.version == VERSION:
                return kept
    found = _measure(identity, device)
    with suppress(OSError):  # a cache that cannot be written costs the next plan a second
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (found.model_dump_json(indent=2) + "\n").encode())
    return found


def _measure(identity: dict[str, str | int | None], device: str) -> Probe:
    import torch

    from quantkit.device import multiplies_bfloat16, multiplies_integers
    from quantkit.maths.int_products import right_factor
    from quantkit.maths.products import times_transposed

    side = GEMM_SIDE
    wide = torch.randn(side, side)
    narrow = wide.to(torch.bfloat16)
    float32 = _rate(lambda: times_transposed(wide, wide))
    bfloat16 = _rate(lambda: torch.mm(narrow, narrow)) if multiplies_bfloat16() else float32
    int8 = 0.0
    if multiplies_integers():
        codes = torch.randint(-127, 128, (side, side), dtype=torch.int8)
        factor, ones = right_factor(codes), torch.ones(side)
        own = factor.way.name != "torch"
        int8 = _rate(lambda: factor.scaled_products(codes, ones, ones, ones) if own else torch._int_mm(codes, codes))
    gpu = None
    if device == "cuda":
        there = torch.randn(side, side, device=device, dtype=torch.float16)

        def multiply() -> None:
            torch.mm(there, there)
            torch.cuda.synchronize()

        gpu = _rate(multiply)
    read, write = _disk(cache_folder())
    return Probe(
        identity=identity,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        float32_flop_s=float32,
        bfloat16_flop_s=bfloat16,
        int8_op_s=int8,
        device_flop_s=gpu,
        read_bytes_s=read,
        write_bytes_s=write,
    )


def _rate(multiply: Callable[[], object]) -> float:
    """Operations a second of a product of GEMM_SIDE, the first of which warms up."""
    multiply()
    best = min(_seconds(multiply) for _ in range(REPETITIONS))
    return 2 * GEMM_SIDE**3 / best


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes a second that are read and written in a folder."""
    block = os.urandom(STEP_BYTES)  # a disk may pack zeros
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place: Path | None = folder
    except OSError:
        place = None
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:

        def write() -> None:
            for _ in range(FILE_BYTES // STEP_BYTES):
                file.write(block)
            os.fsync(file.fileno())

        def read() -> None:
            file.seek(0)
            while file.read(STEP_BYTES):
                pass

        write_s = _seconds(write)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return FILE_BYTES / _seconds(read), FILE_BYTES / write_s
