"""A whole comparison with engines of our own making: one that works, and one for each way of not working."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SHARED_DATA
from oracles.memory_source import MemorySource, store
from quantkit.cli import execute
from quantkit.errors import DataError, RecipeError, UsageError
from quantkit.formats.autogptq import AutoGPTQ
from quantkit.methods.rtn import RTN
from quantkit.progress import Progress
from quantkit.reference import compare as module
from quantkit.reference.compare import compare
from quantkit.reference.engines import REFERENCE_ENGINES, WORKER, Ability, ReferenceEngine
from quantkit.reference.entries import Entry
from quantkit.reference.environments import _finished, engines_folder, pins_sha256
from quantkit.reference.results import ComparisonResults

RECIPE = """
schema_version: 1
method: {name: gptq, bits: 4, group_size: 32}
calibration: {set: pydoc, sequences: 4, length: 32}
bench: [{name: divergence, set: pydoc, sequences: 2, length: 32}]
"""

GOOD = """
import json, shutil, sys
job = json.load(open(sys.argv[1]))
ids = json.load(open(job["ids"]))["ids"]
assert (len(ids), len(ids[0])) == (4, 32), "the ids of the calibration"
wanted = {"method": "gptq", "bits": 4, "group_size": 32, "symmetric": True, "act_order": True}
assert wanted.items() <= job.items(), "what the recipe asks for"
shutil.copytree(ARTIFACT, job["out"])
json.dump({"quantize_s": 0.5, "load_s": 0.1, "save_s": 0.2, "versions": {"torch": "0"}}, open(sys.argv[2], "w"))
"""


def _engine(name: str, worker: Path, **more: Any) -> ReferenceEngine:
    return ReferenceEngine(name, "1.0", (Ability("gptq", (4,)),), worker=worker, **more)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text(RECIPE)
    return str(tmp_path / "job.yaml")


@pytest.fixture
def engines(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the registry's place: engines whose workers are a few lines."""
    artifact = tmp_path / "artifact"
    store(MemorySource(tiny_llama), AutoGPTQ(), artifact, RTN(bits=4, group_size=32, symmetric=True), torch.float16)
    scripts = {
        "good": GOOD.replace("ARTIFACT", repr(str(artifact))),
        "crash": "import sys; sys.exit('a bad day')",
        "hang": "import time; time.sleep(600)",
        "wordy": "import sys; open(sys.argv[2], 'w').write('{\"quantize_s\": \"fast\"}')",
        "empty": "import json, sys; json.dump({'versions': {}}, open(sys.argv[2], 'w'))",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    known = {name: _engine(name, tmp_path / f"{name}.py") for name in scripts}
    known["gpu"] = _engine("gpu", WORKER, needs_gpu="gpu 1.0 needs one")
    known["unpinned"] = _engine("unpinned", WORKER, pins=str(tmp_path / "gone.txt"))
    known["broken"] = _engine("broken", WORKER, pins=str(tmp_path / "pins.txt"))
    # the real worker, in an environment that does not have what it wants
    known["auto-gptq"] = _engine("auto-gptq", WORKER)
    (tmp_path / "pins.txt").write_text("torch==0.0.0\n")
    monkeypatch.setattr(module, "REFERENCE_ENGINES", known)
    monkeypatch.setattr(module, "chosen_engines", list)


def _compare(recipe: str | list[str], model: Path, *engines: str, **more: Any) -> ComparisonResults:
    recipes = recipe if isinstance(recipe, list) else [recipe]
    given = {"settings": (), "runs": 1, "timeout_s": 300.0, "device": "cpu", "progress": Progress(quiet=True)}
    return compare(recipes, engines=engines or None, model=str(model), **(given | more))


def test_every_engine_is_a_row_whatever_becomes_of_it(tiny_llama: Path, recipe: str, engines: None) -> None:
    names = ("quantkit", "good", "crash", "auto-gptq", "gpu", "empty")
    results = _compare(recipe, tiny_llama, *names)
    assert [row.engine for row in results.rows] == list(names)
    assert ComparisonResults.model_validate(json.loads(results.model_dump_json())) == results
    ours, good, crash, absent, gpu, empty = results.rows

    assert ours.reason is None and ours.format == "autogptq"
    assert ours.runs[0].quantize_s and ours.runs[0].wall_s > ours.runs[0].quantize_s > 0
    assert ours.runs[0].cpu_s > 0 and ours.runs[0].peak_rss_bytes > 50e6
    assert good.reason is None and (good.runs[0].quantize_s, good.runs[0].save_s) == (0.5, 0.2)
    assert good.bits_per_weight and 4 < good.bits_per_weight < 6
    for row in (ours, good):
        assert row.kl and row.perplexity and row.top1 and row.kl.error is not None
        assert row.kl.value > 0 and row.perplexity.value > 1 and 0 <= row.top1.value <= 1
    assert results.baseline_perplexity and results.floor and results.floor.two_pass_s > 0

    assert crash.reason == "the process ended with code 1: a bad day" and not crash.runs
    assert absent.reason == "ModuleNotFoundError: No module named 'auto_gptq'"
    assert gpu.reason == "gpu 1.0 needs one"
    assert empty.reason and empty.reason.startswith("its artifact cannot be measured: ") and empty.runs
    assert results.settings["calibration"]["fingerprint"] and results.environment["packages"]["torch"]


def test_what_cannot_be_run_is_told_without_measuring(
    tiny_llama: Path, recipe: str, engines: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # a constraint on torch would word the refusal otherwise
    results = _compare(recipe, tiny_llama, "hang", "broken", "wordy", "unpinned", timeout_s=1.0)
    assert results.rows[0].reason == "stopped after 1 s without an answer"
    reason = results.rows[1].reason
    assert reason and reason.startswith("no environment: ERROR: No matching distribution found for torch==0.0.0")
    assert results.rows[2].reason == 'its answer cannot be used: quantize_s: found "fast", expected a number'
    reason = results.rows[3].reason
    assert reason and reason.startswith("no environment: ") and "gone.txt: No such file or directory" in reason
    assert results.baseline_perplexity is None


def test_under_a_limit_our_rows_are_made_once_more(
    tiny_llama: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", recipe, "--model", str(tiny_llama), "--engines", "quantkit", "--json", "--max-memory"]
    assert execute([*given, "much"]) == 2
    assert '--max-memory: found "much", expected a size' in capsys.readouterr().err
    assert execute([*given, "1.5GB"]) == 0
    free, limited = json.loads(capsys.readouterr().out)["rows"]
    assert limited["label"] == f"{free['label']}, --max-memory 1500MB"
    assert limited["settings"] == free["settings"] | {"max_memory_bytes": 1_500_000_000}
    assert limited["kl"] == free["kl"] and limited["runs"][0]["quantize_s"] > 0
    assert not free["reason"] and not limited["reason"]


def test_further_recipes_get_the_ids_of_the_one_calibration(
    tiny_llama: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first recipe has no use for any; nothing is quantized here."""
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("length: 32}\nb", "length: 32, precision: float32}\nb"))
    seen: list[dict[str, Any]] = []

    def look(entries: list[Entry], *_: Any) -> None:
        for entry in entries:
            used = entry.job["recipe"]["calibration"]
            seen.append(used | {"ids": json.loads(Path(used["set"]).read_text())["ids"]})

    monkeypatch.setattr(module, "_run_all", look)
    results = _compare(["nf4", recipe, str(other)], tiny_llama, "quantkit")
    assert len(seen) == 3 and seen[0]["ids"] == seen[1]["ids"] == seen[2]["ids"]
    assert (len(seen[0]["ids"]), len(seen[0]["ids"][0])) == (4, 32)
    assert [one["precision"] for one in seen] == ["auto", "auto", "float32"]
    used = results.settings["calibration"]
    assert (used["set"], used["sequences"], used["length"], used["seed"]) == ("pydoc", 4, 32, 0)


def test_recipes_that_ask_for_different_things_are_refused(
    tiny_llama: Path, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("sequences: 4", "sequences: 3"))
    command = ["compare", recipe, str(other), "--engines", "quantkit", "--model", str(tiny_llama)]
    assert execute(command) == 2
    assert f"{other}: calibration.sequences: found 3, expected 4 as in {recipe}" in capsys.readouterr().err
    # a setting of the command line is for all of them: the next thing that is wrong is said
    assert execute([*command, "--set", "calibration.sequences=4", "--set", "calibration.set=gone"]) == 3
    assert "gone" in capsys.readouterr().err
    other.write_text(RECIPE.replace("sequences: 2", "sequences: 3"))
    assert execute(command) == 2
    said = capsys.readouterr().err
    assert f"{other}: bench.divergence.sequences: found 3, expected 2 as in {recipe}" in said
    remedy = next(word for word in shlex.split(said.split("hint: ")[1]) if word.startswith("bench=")).rstrip(";")
    # what the hint says mends it: the next thing that is wrong is said, also beside a recipe without a bench
    assert execute([*command, "nf4", "--set", remedy, "--set", "calibration.set=gone"]) == 3
    assert "gone" in capsys.readouterr().err
    assert execute(["compare", recipe, "nf4", "--engines", "auto-gptq", "--model", str(tiny_llama)]) == 2
    assert "--engines auto-gptq: nothing would run nf4" in capsys.readouterr().err
    other.write_text(RECIPE + "model: {id: gone/away}\n")
    Path(recipe).write_text(RECIPE + f"model: {{id: {tiny_llama}}}\n")
    assert execute(["compare", recipe, str(other), "--engines", "quantkit"]) == 2
    assert f"{other}: model.id: found gone/away, expected {tiny_llama}" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_anything_runs(tiny_llama: Path, tmp_path: Path, recipe: str) -> None:
    with pytest.raises(UsageError, match="neither model.id"):
        compare(
            [recipe],
            engines=None,
            model=None,
            settings=(),
            runs=1,
            timeout_s=1,
            device="cpu",
            progress=Progress(quiet=True),
        )
    with pytest.raises(UsageError, match='"gptqmodl": did you mean gptqmodel'):
        _compare(recipe, tiny_llama, "gptqmodl")
    with pytest.raises(RecipeError, match="overrides: other engines"):
        _compare(recipe, tiny_llama, settings=('overrides={"q_proj": skip}',))
    with pytest.raises(RecipeError, match="does ggml"):
        _compare("gguf-q4_0", tiny_llama)
    with pytest.raises(DataError, match="gone"):
        _compare(recipe, tiny_llama, settings=("calibration.set=gone",))


def test_the_verb_refuses_to_write_over_a_file(
    tiny_llama: Path, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    out.touch()
    assert execute(["compare", recipe, "--model", str(tiny_llama), "--out", str(out)]) == 2
    assert "r.json: exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(
    ("engine", "method"),
    [("gptqmodel", "gptq"), ("llmcompressor", "gptq"), ("llmcompressor", "awq"), ("auto-round", "awq")],
)
def test_real_engines_do_the_job(engine: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small real model, in environments that are there already: tests install nothing."""
    monkeypatch.delenv("QUANTKIT_CACHE")
    reference = REFERENCE_ENGINES[engine]
    if not _finished(engines_folder() / f"{engine}-{reference.version}", pins_sha256(reference)):
        pytest.skip(f"{engine} has no environment here; `quantkit compare` makes it")
    model = SHARED_DATA / "models" / "stories15M"
    if not model.is_dir():
        pytest.skip(f"no {model}")
    path = tmp_path / "job.yaml"
    path.write_text(RECIPE.replace("{name: gptq, bits: 4, group_size: 32}", f"{{name: {method}, group_size: 32}}"))
    (row,) = _compare(str(path), model, engine, timeout_s=900.0).rows
    assert row.reason is None
    assert row.versions[engine] == reference.version
    assert row.bits_per_weight and 4.1 < row.bits_per_weight < 5.5
    assert row.kl and 0 < row.kl.value < 1
