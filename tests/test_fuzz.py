"""Damaged inputs with a seed: each is accepted or answered with one message, in bounded time and memory.

benchmarks/fuzz.py runs thousands with other seeds.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fakes.fuzzing import FAILURES, KINDS, make_bases, run

COUNTS = {"recipe": 300, "safetensors": 300, "gguf": 150, "json": 60}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    make_bases(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_accepted_or_answered(bases: Path, kind: str) -> None:
    results = list(run(bases, kind, 0, COUNTS[kind]))
    failures = [
        f"{result.index}: {result.outcome}: {result.detail}" for result in results if result.outcome in FAILURES
    ]
    assert failures == []
    counts = Counter(result.outcome for result in results)
    assert counts["accepted"] + counts["refused"] == COUNTS[kind] and counts["refused"] > COUNTS[kind] // 10
