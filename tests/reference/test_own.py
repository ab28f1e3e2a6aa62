"""quantkit's own run of a comparison's job, in this process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit import jobs
from quantkit.recipe import Recipe
from quantkit.reference.own import work


@pytest.mark.parametrize("limit", [None, 10**9])
def test_a_job_runs_under_its_limit(
    limit: int | None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def run(wanted: Any, source: Any, device: Any, force: bool, progress: Any, memory: Any) -> list[Any]:
        given.extend([wanted[0][2], source.path, memory.limit_bytes])
        return [SimpleNamespace(quantize_s=1.5, quantkit_version="0")]

    monkeypatch.setattr(jobs, "run_passes", run)
    job = {
        "recipe": Recipe.model_validate({"method": {"name": "rtn"}}).model_dump(mode="json"),
        "model": str(tiny_llama),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "out": str(tmp_path / "out"),
        "max_memory_bytes": limit,
    }
    answer = work(job)
    assert given == [tmp_path / "out", tiny_llama, limit]
    assert answer["quantize_s"] == 1.5 and answer["peak_rss_bytes"] > 0
