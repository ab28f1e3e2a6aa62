"""The rows before they run: what each engine is told, and what its row is called."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from quantkit import quiet
from quantkit.model.reader import open_source
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.reference import entries
from quantkit.reference.engines import REFERENCE_ENGINES
from quantkit.reference.entries import Entry, Setting, own_entry, reference_entry, request_of

AWQ = {"name": "awq", "bits": 4, "group_size": 32}
GPTQ = {"name": "gptq", "bits": 4, "group_size": 32}


def _setting(tiny_llama: Path, method: dict[str, object]) -> Setting:
    recipe = Recipe.model_validate({"method": method})
    return Setting(open_source(str(tiny_llama)), recipe, Path("/ids.json"), torch.device("cpu"), 2, "float32")


def _entry(tiny_llama: Path, engine: str, method: dict[str, object]) -> Entry:
    setting = _setting(tiny_llama, method)
    request = request_of("r", setting.recipe)
    return reference_entry(setting, REFERENCE_ENGINES[engine], request, Progress(quiet=True))


@pytest.fixture(autouse=True)
def _no_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "python_of", lambda *_: Path("/env/bin/python"))
    monkeypatch.setenv("PYTHONPATH", "/mine")


def test_an_engine_gets_the_job_of_the_recipe_in_an_environment_of_its_own(tiny_llama: Path) -> None:
    entry = _entry(tiny_llama, "llmcompressor", GPTQ)
    assert entry.reason is None
    assert entry.command[0] == "/env/bin/python" and entry.command[-1].endswith("worker.py")
    wanted = {"method": "gptq", "bits": 4, "group_size": 32, "symmetric": True, "act_order": True, "ids": "/ids.json"}
    assert wanted.items() <= entry.job.items()
    assert json.dumps(entry.job), "the job is a JSON file"
    assert "PYTHONPATH" not in entry.environment
    assert (entry.environment["OMP_NUM_THREADS"], entry.environment["HF_HUB_OFFLINE"]) == ("2", "1")
    assert entry.label == "llmcompressor 0.14.0.1: gptq 4-bit g32 sym act-order, float32"


@pytest.mark.parametrize("by_user", [False, True])
def test_other_engines_keep_their_own_way_of_waiting(
    tiny_llama: Path, by_user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What quantkit sets for its own threads is none of theirs; what the user set is for all."""
    found = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "QUANTKIT_DEBUG")}
    monkeypatch.setattr(os, "environ", found | ({"GOMP_SPINCOUNT": "7"} if by_user else {}))
    monkeypatch.setattr(quiet, "_SET_HERE", set())
    quiet.quiet_libraries()
    assert os.environ["GOMP_SPINCOUNT"] == ("7" if by_user else quiet.ENVIRONMENT["GOMP_SPINCOUNT"])
    assert _entry(tiny_llama, "llmcompressor", GPTQ).environment.get("GOMP_SPINCOUNT") == ("7" if by_user else None)


def test_a_row_says_in_what_an_engine_computes(tiny_llama: Path) -> None:
    """gptqmodel's AWQ refuses float32, in which its GPTQ is fastest on a CPU."""
    assert _entry(tiny_llama, "gptqmodel", AWQ).job["dtype"] == "bfloat16"
    assert _entry(tiny_llama, "gptqmodel", AWQ).label.endswith(", bfloat16")
    assert _entry(tiny_llama, "gptqmodel", GPTQ).job["dtype"] == "float32"


def test_our_own_run_has_the_same_ids_and_our_imports(tiny_llama: Path) -> None:
    setting = _setting(tiny_llama, GPTQ | {"propagate": "unquantized"})
    entry = own_entry(setting, setting.recipe, "job")
    assert entry.job["recipe"]["calibration"]["set"] == "/ids.json"
    assert entry.command[-1] == "quantkit.reference.own" and entry.environment["PYTHONPATH"]
    assert "job: gptq" in entry.label and entry.label.endswith("unquantized inputs")
    assert entry.job["max_memory_bytes"] is None
    limited = own_entry(setting, setting.recipe, "job", 597_000_000)
    assert limited.label == f"{entry.label}, --max-memory 597MB" and limited.job["max_memory_bytes"] == 597_000_000
    assert limited.settings == entry.settings | {"max_memory_bytes": 597_000_000}


def test_our_further_recipes_keep_how_they_calibrate(tiny_llama: Path) -> None:
    """The token ids are the comparison's, in what they are multiplied is a recipe's own."""
    further = Recipe.model_validate({"method": AWQ, "calibration": {"precision": "float32"}})
    found = own_entry(_setting(tiny_llama, GPTQ), further, "job").job["recipe"]
    assert found["calibration"] == further.calibration.model_dump() | {"set": "/ids.json"}
    assert found["method"]["name"] == "awq"
