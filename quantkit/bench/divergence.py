"""Divergence: what the artifact predicts on held-out text, beside what the baseline predicts there."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run
from quantkit.sections import DivergenceBench

ROWS = 64
"""Positions compared at once: a block of log-probabilities stays in the cache of the processor."""


def measure(section: DivergenceBench, run: Run) -> list[Measurement]:
    """perplexity; for an artifact also kl and top1 against the baseline. Standard errors are over sequences.

    The token ids lie in the scratch folder. The baseline leaves its log-probabilities there, float32, and every
    artifact reads them from the file.
    """
    ids = torch.from_numpy(np.load(ids_path(run.scratch, section)))  # [sequences, length]
    session = run.quality()
    path = run.scratch / f"{key(section)}.npy"
    text = {"set": section.set, "sequences": ids.shape[0], "length": ids.shape[1]}
    settings = {**text, "dtype": session.dtype, **session.details}
    known = None if run.is_baseline else _known(path, ids)
    made = None
    losses, divergences, agreements = [], [], []
    for row, sequence in enumerate(ids):
        logits = session.logits(sequence)[:-1]  # [length - 1, vocabulary], the last one predicts what is not there
        log_probs = logits.log_softmax(-1)
        losses.append(float(-log_probs.gather(1, sequence[1:, None]).double().mean()))
        if run.is_baseline:
            made = _create(path, (len(ids), *log_probs.shape)) if made is None else made
            made[row] = log_probs.numpy()
        elif isinstance(known, np.ndarray):
            if known.shape[1:] != tuple(log_probs.shape):
                known = f"{session.engine} predicts {log_probs.shape[1]} tokens, the baseline {known.shape[2]}"
            else:
                kl, agreement = compare(torch.from_numpy(known[row]), log_probs)
                divergences.append(kl)
                agreements.append(agreement)
    if made is not None:
        made.flush()
        _partial(path).rename(path)  # whole, or not there
    found = [_perplexity(losses, session.engine, settings)]
    if run.is_baseline:
        return found
    for metric, unit, values in (("kl", "nats", divergences), ("top1", "fraction", agreements)):
        if isinstance(known, str):
            found.append(Measurement(metric=metric, value=None, unit=unit, missing=known, settings=settings))
        else:
            found.append(_mean(metric, unit, values, session.engine, settings))
    return found


def key(section: DivergenceBench) -> str:
    """A file name for what is measured on one text."""
    return f"divergence-{hashlib.sha256(section.model_dump_json().encode()).hexdigest()[:16]}"


def ids_path(scratch: Path, section: DivergenceBench) -> Path:
    """Where the token ids of a section lie: int64 [sequences, length]."""
    return scratch / f"{key(section)}-ids.npy"


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def compare(reference: Tensor, log_probs: Tensor) -> tuple[float, float]:
    """Mean KL(reference || other) in nats, and the share of positions whose likeliest token is the same.

    Both: float32 log-probabilities [positions, vocabulary].
    """
    total = agreed = 0.0
    for ours, theirs in zip(log_probs.split(ROWS), reference.split(ROWS), strict=True):
        total += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
        agreed += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
    return total / len(log_probs), agreed / len(log_probs)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values, None for a single one."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _perplexity(losses: Sequence[float], engine: str, settings: dict[str, object]) -> Measurement:
    """exp of the mean loss; its error is that of the mean loss carried through the exponential."""
    value = math.exp(math.fsum(losses) / len(losses))
    error = standard_error(losses)
    return Measurement(
        metric="perplexity",
        value=value,
        unit="",
        error=None if error is None else value * error,
        samples=len(losses),
        engine=engine,
        settings=settings,
    )


def _mean(metric: str, unit: str, values: Sequence[float], engine: str, settings: dict[str, object]) -> Measurement:
    return Measurement(
        metric=metric,
        value=math.fsum(values) / len(values),
        unit=unit,
        error=standard_error(values),
        samples=len(values),
        engine=engine,
        settings=settings,
    )


def _known(path: Path, ids: Tensor) -> np.ndarray | str:
    """The baseline's log-probabilities [sequences, length - 1, vocabulary], or why there are none."""
    if not path.is_file():
        return "the baseline was not measured on this text"
    known = np.load(path, mmap_mode="c")  # copy on write: torch wants memory it could write to
    return known if known.shape[0] == ids.shape[0] else "the baseline was measured on other text"


def _create(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A float32 file of this shape. Raises OSError when the disk has no room for it."""
    needed, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(28, f"{needed} bytes of log-probabilities do not fit in {free} free bytes", str(path))
    return np.lib.format.open_memmap(_partial(path), mode="w+", dtype=np.float32, shape=shape)
