"""Models by hub id, end to end against a hub on the loopback, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.hub import COMMIT, FakeHub, Repository

SCRIPT = """
import json, sys
from quantkit.errors import QuantkitError
from quantkit.model.reader import open_source
answers = {}
for case in json.loads(sys.argv[1]):
    try:
        source = open_source(case["model"], revision=case.get("revision", "main"), token=case.get("token"))
        first = source.names()[0]
        answers[case["name"]] = {
            "lineage": source.lineage(),
            "sum": float(source.read(first).double().sum()),
            "side_files": [path.name for path in source.side_files()],
            "card": source.card(),
            "files": sorted(path.name for path in source.path.iterdir()),
        }
    except QuantkitError as error:
        answers[case["name"]] = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
print(json.dumps(answers))
"""


def ask(cases: list[dict[str, str]], home: Path, endpoint: str, offline: bool = False, **more: str) -> dict[str, Any]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "PROXY" not in key.upper()}
    environment = {
        **ours,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        **more,
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Any]:
    """What a first process finds online, and a second one offline with the same cache."""
    good = Repository.of_folder(tiny_llama)
    good.files["README.md"] = b"---\nlicense: mit\nbase_model: acme/pretrained\n---\na card"
    good.files["pytorch_model.bin"] = b"never fetched"
    good.files["original/model.safetensors"] = b"never fetched"
    good.files["LICENSE"] = b"a licence"
    changed = json.loads(good.files["generation_config.json"]) | {"max_length": 77}
    good.branches["v2"] = {**good.files, "generation_config.json": json.dumps(changed).encode()}
    quantized = Repository(
        {**good.files, "config.json": json.dumps({"quantization_config": {"quant_method": "awq"}}).encode()}
    )
    pickled = {name: content for name, content in good.files.items() if not name.endswith(".safetensors")}
    hub = FakeHub(
        {
            "acme/tiny": good,
            "acme/gated": Repository(good.files, gated=True, readers=("hf_admitted",)),
            "acme/private": Repository(good.files, private=True, readers=("hf_owner",)),
            "acme/quantized": quantized,
            "acme/pickled": Repository(pickled),
        },
        broken=("acme/broken",),
    )
    home = tmp_path_factory.mktemp("hub-home")
    with hub:
        online = ask(
            [
                {"name": "good", "model": "acme/tiny", "token": "hf_secret"},
                {"name": "by commit", "model": "acme/tiny", "revision": COMMIT},
                {"name": "revision", "model": "acme/tiny", "revision": "v9"},
                {"name": "unknown", "model": "acme/absent"},
                {"name": "unknown, signed in", "model": "acme/absent", "token": "hf_secret"},
                {"name": "branch", "model": "acme/tiny", "revision": "v2"},
                {"name": "gated", "model": "acme/gated"},
                {"name": "gated, not admitted", "model": "acme/gated", "token": "hf_other"},
                {"name": "private", "model": "acme/private", "token": "hf_other"},
                {"name": "quantized", "model": "acme/quantized"},
                {"name": "pickled", "model": "acme/pickled"},
                {"name": "broken", "model": "acme/broken"},
            ],
            home,
            hub.endpoint,
        )
        before = len(hub.tokens)
        cases = [{"name": "private, owner", "model": "acme/private"}]
        online |= ask(cases, tmp_path_factory.mktemp("owner"), hub.endpoint, HF_TOKEN="hf_owner")
        cases = [{"name": "gated, admitted", "model": "acme/gated"}]
        online |= ask(cases, tmp_path_factory.mktemp("admitted"), hub.endpoint, HF_TOKEN="hf_admitted")
        own = {
            token for (_, path), token in list(zip(hub.requests, hub.tokens, strict=True))[before:] if "acme/" in path
        }
        asked = [path for method, path in hub.requests if method == "GET"]
        endpoint = hub.endpoint
    offline = ask(
        [{"name": "cached", "model": "acme/tiny"}, {"name": "offline", "model": "acme/absent"}],
        home,
        endpoint,
        offline=True,
    )
    down = ask([{"name": "down", "model": "acme/absent"}], home, endpoint)
    return {**online, **offline, **down, "asked": asked, "tokens": hub.tokens, "own tokens": own}


def test_a_model_arrives_with_the_commit_in_its_lineage(answers: dict[str, Any], tiny_llama: Path) -> None:
    from quantkit.model.reader import open_source

    local = open_source(str(tiny_llama))
    good = answers["good"]
    assert good["lineage"] == {**local.lineage(), "id": "acme/tiny", "revision": COMMIT}
    assert good["sum"] == pytest.approx(float(local.read(local.names()[0]).double().sum()))
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"} <= set(good["side_files"])
    assert "Bearer hf_secret" in answers["tokens"]
    assert answers["by commit"]["lineage"] == good["lineage"]


def test_only_what_is_needed_is_fetched(answers: dict[str, Any]) -> None:
    fetched = set(answers["good"]["files"])
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "original"}
    assert not [path for path in answers["asked"] if path.endswith("pytorch_model.bin")]
    weights = [path for path in answers["asked"] if path.endswith("model.safetensors")]
    assert [path for path in weights if "acme/quantized" in path] == [], "a model that will not do is not downloaded"


def test_a_branch_has_its_own_commit_and_files(answers: dict[str, Any]) -> None:
    branch, main = answers["branch"]["lineage"], answers["good"]["lineage"]
    assert branch["revision"] != main["revision"] and branch["files"] == main["files"]


def test_the_token_of_the_environment_opens_what_is_restricted(answers: dict[str, Any]) -> None:
    for case, name in (("private, owner", "acme/private"), ("gated, admitted", "acme/gated")):
        assert answers[case]["lineage"]["id"] == name and answers[case]["sum"] == answers["good"]["sum"]
    assert answers["own tokens"] == {"Bearer hf_owner", "Bearer hf_admitted"}


def test_the_card_of_the_hub_says_licence_and_id(answers: dict[str, Any]) -> None:
    assert answers["good"]["card"] == {"base_model": "acme/tiny", "license": "mit"}


def test_a_cached_model_opens_offline(answers: dict[str, Any]) -> None:
    assert answers["cached"] == answers["good"]


@pytest.mark.parametrize(
    ("case", "message", "hint"),
    [
        ("revision", "acme/tiny: the hub has no revision v9", "branch"),
        ("unknown", "acme/absent: neither a file or folder here nor a model", "spelling"),
        ("unknown, signed in", "acme/absent: neither a file or folder here nor a model", "spelling"),
        ("gated", "acme/gated (revision main): access is restricted", "HF_TOKEN"),
        ("gated, not admitted", "acme/gated (revision main): access is restricted", "HF_TOKEN"),
        ("private", "acme/private: neither a file or folder here nor a model that the hub shows", "HF_TOKEN"),
        ("quantized", "already quantized (awq)", "made from"),
        ("pickled", "no weights: expected model.safetensors", "convert"),
        ("broken", "500", "HF_ENDPOINT"),
        ("offline", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        ("down", "the hub cannot be reached", "HF_ENDPOINT"),
    ],
)
def test_what_goes_wrong_is_one_message_with_a_hint(
    answers: dict[str, Any], case: str, message: str, hint: str
) -> None:
    answer = answers[case]
    assert answer["exit_code"] == 3
    assert message in answer["error"]
    assert hint in answer["hint"]
    assert len(answer["error"].splitlines()) == 1
