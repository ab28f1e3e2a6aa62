"""Divergence: what the artifact predicts on held-out text, beside what the baseline predicts there."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.bench.baseline_cache import LIMIT_BYTES, cache_path, prune
from quantkit.bench.measurement import DIVERGENCES, KL_QUANTILES, Measurement
from quantkit.bench.predictions import (
    Divergence,
    Predictions,
    PredictionsFile,
    compare,
    losses_of,
    predictions_of,
    write_predictions,
)
from quantkit.bench.run import Run
from quantkit.bench.statistics import quantile, standard_error
from quantkit.engines import Session
from quantkit.engines.base import dtype_name, other_dtype
from quantkit.sections import DivergenceBench, SpeculativeBench

NOISE_SEQUENCES = 4
"""Sequences that the baseline runs again in another dtype: enough to tell a noise from a loss."""


def measure(section: DivergenceBench, run: Run) -> list[Measurement]:
    """perplexity; for an artifact also kl, its quantiles over tokens, top1 and tv against the baseline, and for the
    baseline kl_noise, against itself in another dtype. Standard errors are over sequences.

    The token ids lie in the scratch folder. The baseline leaves its predictions there, from the cache when it was
    measured on the same text before, and every artifact reads them from the file.
    """
    ids = torch.from_numpy(np.load(ids_path(run.scratch, section)))  # [sequences, length]
    path = run.scratch / key(section)
    text = {"set": section.set, "sequences": ids.shape[0], "length": ids.shape[1]}
    return _baseline(run, ids, path, text) if run.is_baseline else _artifact(run, ids, path, text)


def _baseline(run: Run, ids: Tensor, path: Path, text: dict[str, object]) -> list[Measurement]:
    dtype = run.quality_dtype()
    kept = cache_path(run.subject.source, ids, dtype_name(dtype), run.device.type)
    known = _cached(kept, ids)
    if known is None:
        write_predictions(path, _predictions(run.quality(), ids), len(ids))
        noise = _noise(run, ids, PredictionsFile(path))
        np.save(path / "noise.npy", noise)
        known = PredictionsFile(path)
        if sum(item.stat().st_size for item in path.iterdir()) <= LIMIT_BYTES // 2:
            _keep(path, kept)
    else:
        path.symlink_to(kept, target_is_directory=True)
        noise = np.load(kept / "noise.npy")
    engine = "transformers"
    settings = {**text, "dtype": dtype_name(dtype), "top": known.tokens.shape[2]}
    other = other_dtype(dtype, run.subject.stored_dtype())
    against = {**settings, "sequences": len(noise), "against": dtype_name(other)}
    return [
        _perplexity(known.losses, engine, settings),
        _mean("kl_noise", "nats", noise, engine, against),
    ]


def _artifact(run: Run, ids: Tensor, path: Path, text: dict[str, object]) -> list[Measurement]:
    session = run.quality()
    known: PredictionsFile | str = _known(path, ids)
    settings: dict[str, object] = {**text, "dtype": session.dtype, **session.details}
    losses, found = [], []
    for row, sequence in enumerate(ids):
        log_probs = session.logits(sequence)[:-1].log_softmax(-1)
        losses.append(losses_of(log_probs, sequence[1:]).numpy())
        if isinstance(known, PredictionsFile) and known.vocabulary != log_probs.shape[1]:
            known = f"{session.engine} predicts {log_probs.shape[1]} tokens, the baseline {known.vocabulary}"
        if isinstance(known, PredictionsFile):
            found.append(compare(known.sequence(row), log_probs))
    perplexity = _perplexity(np.stack(losses), session.engine, settings)
    if isinstance(known, str):
        return [perplexity, *(_missing(metric, unit, known, settings) for metric, unit in DIVERGENCES.items())]
    settings["top"] = known.tokens.shape[2]
    return [perplexity, *_divergences(found, session.engine, settings)]


def _divergences(found: list[Divergence], engine: str, settings: dict[str, object]) -> list[Measurement]:
    kl = torch.stack([one.kl for one in found]).numpy()  # [sequences, length - 1]
    same = torch.stack([one.same_top for one in found]).numpy()
    apart = torch.stack([one.total_variation for one in found]).numpy()
    quantiles = []
    for name, share in KL_QUANTILES.items():
        value, error = quantile(kl, share)
        quantiles.append(
            Measurement(
                metric=name, value=value, unit="nats", error=error, samples=kl.size, engine=engine, settings=settings
            )
        )
    return [
        _mean("kl", "nats", kl, engine, settings),
        *quantiles,
        _mean("top1", "fraction", same, engine, settings),
        _mean("tv", "fraction", apart, engine, settings),
    ]


def _predictions(session: Session, ids: Tensor) -> Iterator[Predictions]:
    for sequence in ids:
        # the last position predicts what is not there
        yield predictions_of(session.logits(sequence)[:-1].log_softmax(-1), sequence[1:])


def _noise(run: Run, ids: Tensor, known: PredictionsFile) -> NDArray[np.float64]:
    """KL of the baseline to itself in another dtype, float64 [sequences, length - 1], on the first sequences."""
    session = run.in_dtype(other_dtype(run.quality_dtype(), run.subject.stored_dtype()))
    rows = range(min(NOISE_SEQUENCES, len(ids)))
    found = [compare(known.sequence(row), session.logits(ids[row])[:-1].log_softmax(-1)).kl for row in rows]
    run.close()
    return torch.stack(found).numpy()


def _cached(kept: Path, ids: Tensor) -> PredictionsFile | None:
    """What the cache holds for this text, None when there is nothing or it is damaged: then it is made again."""
    try:
        found = PredictionsFile(kept)
        sound = found.tokens.shape[:2] == (ids.shape[0], ids.shape[1] - 1) and (kept / "noise.npy").is_file()
        kept.touch()
    except (OSError, ValueError, EOFError):
        return None
    return found if sound else None


def _keep(path: Path, kept: Path) -> None:
    """Move predictions from the scratch folder into the cache. One that cannot be written costs time, not results."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}-{os.getpid()}")
        shutil.copytree(path, partial)
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
        prune(kept.parent)
    except OSError:
        return


def key(section: DivergenceBench | SpeculativeBench) -> str:
    """A file name for what is measured on one text."""
    return f"{section.name}-{hashlib.sha256(section.model_dump_json().encode()).hexdigest()[:16]}"


def ids_path(scratch: Path, section: DivergenceBench | SpeculativeBench) -> Path:
    """Where the token ids of a section lie: int64 [sequences, length]."""
    return scratch / f"{key(section)}-ids.npy"


def _perplexity(losses: NDArray[np.float64], engine: str, settings: dict[str, object]) -> Measurement:
    """exp of the mean loss [sequences, positions]; its error is that of the mean loss carried through the
    exponential."""
    by_sequence = losses.mean(axis=1).tolist()
    value = math.exp(math.fsum(by_sequence) / len(by_sequence))
    error = standard_error(by_sequence)
    return Measurement(
        metric="perplexity",
        value=value,
        unit="",
        error=None if error is None else value * error,
        samples=len(by_sequence),
        engine=engine,
        settings=settings,
    )


def _mean(metric: str, unit: str, values: NDArray[np.float64], engine: str, settings: dict[str, object]) -> Measurement:
    """The mean of values [sequences, positions] and its standard error over sequences."""
    by_sequence = values.mean(axis=1).tolist()
    return Measurement(
        metric=metric,
        value=math.fsum(by_sequence) / len(by_sequence),
        unit=unit,
        error=standard_error(by_sequence),
        samples=len(by_sequence),
        engine=engine,
        settings=settings,
    )


def _missing(metric: str, unit: str, reason: str, settings: dict[str, object]) -> Measurement:
    return Measurement(metric=metric, value=None, unit=unit, missing=reason, settings=settings)


def _known(path: Path, ids: Tensor) -> PredictionsFile | str:
    """The baseline's predictions, or why there are none."""
    if not path.is_dir():
        return "the baseline was not measured on this text"
    known = PredictionsFile(path)
    return known if len(known) == len(ids) else "the baseline was measured on other text"
