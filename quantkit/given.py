"""What the bytes of a run's artifacts depend on: a run that is gone on with must have been given the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.environment import cpu_model, package_versions
from quantkit.model.source import Source
from quantkit.one_block import Job

PACKAGES = ("torch", "transformers", "numba", "bitsandbytes", "gguf")
"""Those that compute or write something of an artifact."""


def given(jobs: Sequence[Job], source: Source, device: torch.device) -> dict[str, Any]:
    """Recipes, model, version, processor and threads, as JSON with names that a message can show.

    The model's weight files are known by size and time of change: hashing them would take as long as a block. What a
    calibration set holds is compared when its pass begins.
    """
    versions = package_versions()
    return {
        "artifacts": [job.out.name for job in jobs],
        "recipe": {job.label: job.recipe.model_dump(mode="json") for job in jobs},
        "importance": {job.label: _importance_sha256(job) for job in jobs if job.importance},
        "model": {
            "name": source.path.resolve().name,
            "config": _sha256(json.dumps(source.config, sort_keys=True).encode()),
            **{path.name: _state_of(path) for path in source.weight_paths()},
        },
        "quantkit": __version__,
        "packages": {name: versions[name] for name in PACKAGES},
        "processor": cpu_model(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _state_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} bytes, changed {status.st_mtime_ns / 1e9:.6f}"


def _importance_sha256(job: Job) -> str:
    digest = hashlib.sha256()
    for name in sorted(job.importance):
        entry = job.importance[name]
        digest.update(f"{name} {entry.count} ".encode() + entry.squares.float().numpy().tobytes())
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
