"""Memory: bytes of the file, bits per weight from those bytes, what the loaded model takes and its peak."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run, weight_files
from quantkit.bench.subject import Artifact, Unavailable
from quantkit.environment import peak_rss_bytes
from quantkit.inspection import FULL_BITS
from quantkit.sections import MemoryBench


def measure(section: MemoryBench, run: Run) -> list[Measurement]:
    """artifact, bits_per_weight, bits_per_weight_all, loaded, peak_rss, peak_vram.

    Runs behind the throughput and before the quality, so that the peak is that of loading and running.
    """
    return [*stored(run), *resident(run), _vram(run)]


def stored(run: Run) -> list[Measurement]:
    """What the file takes; no weight is read."""
    source = run.subject.source
    sizes = {name: prod(source.shape(name)) for name in source.names()}
    if isinstance(run.subject, Artifact):
        size = weight_bytes(run.subject.path)
        bits = {name: 8 * run.subject.source.stored_bytes(name) for name in sizes}
    else:
        # what the decoded weights of a GGUF file take says nothing about the file they came from
        bits = {name: 8 * count * source.dtype(name).itemsize for name, count in sizes.items()}
        size = sum(bits.values()) // 8
    names = [name for name in run.subject.linears() if not _full(run, bits[name], sizes[name])]
    quantized = sum(sizes[name] for name in names)
    everything = sum(sizes.values())
    if quantized:
        each = Measurement(
            metric="bits_per_weight", value=sum(bits[name] for name in names) / quantized, unit="bits/weight"
        )
    else:
        each = Measurement(metric="bits_per_weight", value=None, unit="bits/weight", missing="no linear is quantized")
    return [
        Measurement(metric="artifact", value=size, unit="bytes", settings={"counts": "weight files"}),
        each,
        Measurement(metric="bits_per_weight_all", value=8 * size / everything, unit="bits/weight"),
    ]


def _full(run: Run, bits: int, count: int) -> bool:
    """Whether a linear of an artifact was left unquantized; all linears of the baseline count."""
    return not run.is_baseline and bits >= FULL_BITS * count


def weight_bytes(path: Path) -> int:
    """Bytes of the files that hold weights, tables and headers included."""
    return sum(item.stat().st_size for item in weight_files(path))


def resident(run: Run) -> list[Measurement]:
    """What the engine takes: after loading and one short pass, and at the peak so far."""
    try:
        session = run.speed()
    except Unavailable as error:
        names, reason = ("loaded", "peak_rss"), str(error)
        return [Measurement(metric=name, value=None, unit="bytes", missing=reason) for name in names]
    assert run.loaded_rss is not None, "noted when it was loaded"
    settings = {"dtype": session.dtype, "imports_bytes": run.imports_rss, **session.details}
    loaded = max(run.loaded_rss - run.imports_rss, 0)
    return [
        Measurement(metric="loaded", value=loaded, unit="bytes", engine=session.engine, settings=settings),
        Measurement(metric="peak_rss", value=peak_rss_bytes(), unit="bytes", engine=session.engine, settings=settings),
    ]


def _vram(run: Run) -> Measurement:
    if run.device.type != "cuda":
        return Measurement(metric="peak_vram", value=None, unit="bytes", missing="no GPU was used")
    try:
        session = run.speed()
    except Unavailable as error:
        return Measurement(metric="peak_vram", value=None, unit="bytes", missing=str(error))
    if session.model is None:
        return Measurement(metric="peak_vram", value=None, unit="bytes", missing=f"{session.engine} ran on the CPU")
    return Measurement(metric="peak_vram", value=torch.cuda.max_memory_allocated(), unit="bytes", engine=session.engine)
