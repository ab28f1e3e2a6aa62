from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from fakes.runs import quietly
from quantkit import pipeline
from quantkit.compiling import SAID, compiling_told

LOOPS = """
from numba import njit

@njit(cache=True)
def one(x):
    return x + 1

@njit(cache=True)
def two(x):
    return one(x) * 2
"""


def loops(folder: Path) -> Any:
    """A module of loops as a new process has it: nothing compiled, what the cache holds aside."""
    path = folder / "loops.py"
    if not path.exists():
        path.write_text(LOOPS)
    spec = spec_from_file_location("loops", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_told_once_and_not_of_what_the_cache_holds(tmp_path: Path) -> None:
    said: list[str] = []
    with compiling_told(said.append):
        assert said == []
        assert loops(tmp_path).two(1.0) == 4.0  # both are compiled
    assert said == [SAID]
    with compiling_told(said.append):
        assert loops(tmp_path).two(2.0) == 6.0  # neither is
    loops(tmp_path).two(1)  # for integers, when nobody listens
    assert said == [SAID]


@pytest.mark.parametrize(
    ("recipe", "settings", "listened"),
    [
        ("gptq-4bit-g64-plain", ["calibration.sequences=2", "calibration.length=16"], 1),
        ("gguf-q4_0", [], 1),
        ("gguf-q4_0", ["method.type=bf16"], 0),
        ("int8", [], 1),
        ("nf4", [], 0),
        ("rtn-4bit-g128", ["method.group_size=64"], 0),
    ],
)
def test_runs_that_take_loops_tell(
    recipe: str, settings: list[str], listened: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do without numba, which takes its time and memory."""
    asked: list[Any] = []
    monkeypatch.setattr(pipeline, "compiling_told", lambda say: asked.append(say) or compiling_told(say))
    quietly(recipe, tiny_llama, tmp_path / "out", settings)
    assert len(asked) == listened
