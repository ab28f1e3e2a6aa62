"""What the baseline predicted on a text, kept between runs: a suite that runs again does not run the baseline again."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from quantkit.bench.measurement import METRICS_VERSION
from quantkit.bench.predictions import TOP
from quantkit.resources import cache_folder

if TYPE_CHECKING:
    from quantkit.model.source import Source

LIMIT_BYTES = 4 * 10**9
"""What the cache may take on disk; what was used longest ago goes first."""


def cache_path(source: Source, ids: Tensor, dtype: str, device: str) -> Path:
    """Where the predictions of a model lie for these token ids, int64 [sequences, length].

    The model is known by its config and by the names, sizes and times of its weight files: hashing them would take
    longer than many a run that it saves.
    """
    from quantkit.bench.run import weight_files

    files = [(path.resolve(), path.stat()) for path in weight_files(source.path)]
    key = {
        "metrics_version": METRICS_VERSION,
        "top": TOP,
        "config": source.config,
        "weights": [(str(path), found.st_size, found.st_mtime_ns) for path, found in files],
        "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "dtype": dtype,
        "device": device,
        "libraries": [version("torch"), version("transformers")],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "predictions" / digest[:32]


def prune(folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Remove what was used longest ago from the cache until it is within its limit; the newest always stays."""
    kept = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(item.stat().st_size for item in path.iterdir()) for path in kept}
    while len(kept) > 1 and sum(sizes[path] for path in kept) > limit_bytes:
        shutil.rmtree(kept.pop(0), ignore_errors=True)
