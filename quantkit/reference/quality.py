"""What an engine's artifact loses: its decoded weights against the unquantized model, on text nobody calibrated on.

The measuring is the bench's, in the bench's processes; no engine is used to run the weights, so that every artifact is
judged by the same arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.bench.divergence import ids_path
from quantkit.bench.process import WorkerFailed, run_worker
from quantkit.bench.worker import Job
from quantkit.model.source import Source
from quantkit.reference.results import Figure
from quantkit.sections import DivergenceBench

TIMEOUT_S = 3600.0
SHOWN = ("perplexity", "kl", "top1")
REASON = "a comparison measures decoded weights"


class Judge:
    """Measures artifacts of one model on one text; the model itself is measured when it is made.

    ids: int64 [sequences, length]. baseline: the perplexity of the unquantized model. Raises WorkerFailed when that
    cannot be measured.
    """

    def __init__(self, source: Source, section: DivergenceBench, ids: torch.Tensor, device: str, scratch: Path):
        self._common: dict[str, Any] = {
            "sections": (section,),
            "device": device,
            "threads": torch.get_num_threads(),
            "scratch": str(scratch),
            "tokenizer_folder": str(source.tokenizer_folder().absolute()),
        }
        np.save(ids_path(scratch, section), ids.numpy())
        job = Job(kind="baseline", path=str(source.path.absolute()), **self._common)
        self.baseline = self._measured(job)["perplexity"]

    def measure(self, artifact: Path) -> dict[str, Figure]:
        """perplexity, kl and top1 of an artifact. Raises WorkerFailed with the reason when there are none."""
        job = Job(kind="artifact", path=str(artifact.absolute()), without_engine=REASON, **self._common)
        return self._measured(job)

    def _measured(self, job: Job) -> dict[str, Figure]:
        found = run_worker(job, TIMEOUT_S).measurements
        for one in found:
            if one.value is None:
                raise WorkerFailed(f"{one.metric}: {one.missing}")
        return {
            one.metric: Figure(value=one.value, error=one.error)
            for one in found
            if one.metric in SHOWN and one.value is not None
        }


def what_was_written(folder: Path) -> dict[str, Any]:
    """format, bytes (of the weight files) and bits_per_weight (of the quantized linears). Raises ModelError."""
    from quantkit.inspection import inspect

    facts = inspect(folder)
    return {"format": facts["format"], "bytes": facts["weight_bytes"], "bits_per_weight": facts["bits_per_weight"]}
