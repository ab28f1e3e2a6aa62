"""Calibration sets by hub id, end to end against a hub on the loopback, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.hub import COMMIT, FakeHub, Repository
from fakes.rows import sentences

SCRIPT = """
import json, sys
from quantkit.errors import QuantkitError
from quantkit.model.calibration_rows import documents
from quantkit.model.calibration_sets import PARTS, find_set
answers = {}
for name in json.loads(sys.argv[1]):
    try:
        answers[name] = {part: documents(find_set(name + ".yaml"), part, None) for part in PARTS}
    except QuantkitError as error:
        answers[name] = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
print(json.dumps(answers))
"""

CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
---
"""

DEFINITIONS = {
    "whole": f"{{id: acme/texts, revision: {COMMIT}, config: small, split: train, evaluation_split: test}}",
    "held-out": f"{{id: acme/texts, revision: {COMMIT}, config: small}}",
    "first-rows": f"{{id: acme/texts, revision: {COMMIT}, config: small, evaluation_split: test, rows: 7}}",
    "branch": "{id: acme/texts, config: small}",
    "no-config": f"{{id: acme/texts, revision: {COMMIT}, config: large}}",
    "no-split": f"{{id: acme/texts, revision: {COMMIT}, config: small, split: dev}}",
    "no-set": "{id: acme/absent}",
    "no-commit": f"{{id: acme/texts, revision: {'f' * 40}, config: small}}",
}


def ask(names: list[str], home: Path, endpoint: str, offline: bool = False) -> tuple[dict[str, Any], str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "PROXY" not in key.upper()}
    environment = {
        **ours,
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "QUANTKIT_CACHE": str(home / "quantkit"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a first process finds online, and a second one offline with the same cache."""
    home = tmp_path_factory.mktemp("home")
    for name, hub_set in DEFINITIONS.items():
        (home / f"{name}.yaml").write_text(f"hub: {hub_set}\n")
    files = {
        "README.md": CARD.encode(),
        "train.jsonl": "\n".join(json.dumps({"text": text}) for text in sentences(50)).encode(),
        "test.jsonl": "\n".join(json.dumps({"text": text}) for text in sentences(20, seed=1)).encode(),
    }
    with FakeHub({"acme/texts": Repository(files, kind="datasets")}) as hub:
        online, printed = ask(list(DEFINITIONS), home, hub.endpoint)
        endpoint = hub.endpoint
    offline, _ = ask(["whole", "no-commit", "no-set"], home, endpoint, offline=True)
    return {**online, "printed": printed, "offline": offline, "home": home}


def test_splits_arrive_as_parts(answers: dict[str, Any]) -> None:
    assert answers["whole"] == {"calibration": sentences(50), "evaluation": sentences(20, seed=1)}
    assert answers["first-rows"] == {"calibration": sentences(50)[:7], "evaluation": sentences(20, seed=1)[:7]}
    assert answers["branch"] == answers["held-out"]


def test_a_tenth_is_held_out_of_a_set_with_one_split(answers: dict[str, Any]) -> None:
    parts = answers["held-out"]
    assert len(parts["evaluation"]) == 5
    assert sorted(parts["calibration"] + parts["evaluation"]) == sorted(sentences(50))


def test_it_is_quiet_and_cached_under_quantkits_own_folder(answers: dict[str, Any]) -> None:
    assert "examples/s" not in answers["printed"]
    assert list((answers["home"] / "quantkit" / "datasets").rglob("*.arrow"))
    assert answers["offline"]["whole"] == answers["whole"]


@pytest.mark.parametrize(
    ("case", "message", "hint"),
    [
        ("no-config", "BuilderConfig 'large' not found. Available: ['small']", "config and split"),
        ("no-split", 'Unknown split "dev"', "config and split"),
        ("no-set", "acme/absent (revision main, split train): cannot be read", "HF_TOKEN"),
        ("no-commit", "doesn't exist", "revision"),
    ],
)
def test_what_goes_wrong_online(answers: dict[str, Any], case: str, message: str, hint: str) -> None:
    assert message in answers[case]["error"]
    assert hint in answers[case]["hint"]
    assert answers[case]["exit_code"] == 3


def test_offline_another_commit_is_no_substitute(answers: dict[str, Any]) -> None:
    assert f"the cache holds another commit: {COMMIT}" in answers["offline"]["no-commit"]["error"]
    assert "HF_HUB_OFFLINE is set" in answers["offline"]["no-set"]["hint"]
