"""Models by their headers alone: a local folder, a config without weights, and a hub that serves ranges."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.hub import FakeHub, Repository
from fakes.large_model import large_model, tensors
from quantkit.errors import ModelError
from quantkit.model.headers import HeaderSource, open_headers
from quantkit.model.reader import open_source

SCRIPT = """
import json, sys
from quantkit.errors import QuantkitError
from quantkit.model.headers import open_headers
answers = {}
for model in sys.argv[1:]:
    try:
        source = open_headers(model)
        names = source.names()
        answers[model] = {
            "shapes": {name: list(source.shape(name)) for name in names},
            "dtypes": sorted({str(source.dtype(name)) for name in names}),
            "tied": source.tied_head,
            "notes": source.notes,
            "revision": source.lineage()["revision"],
            "weights": [path.name for path in source.path.iterdir() if path.suffix == ".safetensors"],
        }
    except QuantkitError as error:
        answers[model] = {"error": error.message, "hint": error.hint}
print(json.dumps(answers))
"""


def ask(models: list[str], home: Path, endpoint: str) -> dict[str, Any]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "PROXY" not in key.upper()}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {**ours, **settings, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", SCRIPT, *models]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, tiny_llama_tied: Path) -> dict[str, Any]:
    tiny = Repository.of_folder(tiny_llama_tied)
    weights = tiny.files["model.safetensors"]
    pickled = {name: content for name, content in tiny.files.items() if not name.endswith(".safetensors")}
    hub = FakeHub(
        {
            "acme/tiny": tiny,
            "acme/large": large_model(),
            "acme/pickled": Repository(pickled),
            "acme/gated": Repository(tiny.files, gated=True),
            "acme/cut": Repository({**tiny.files, "model.safetensors": weights[:-8]}),
            "acme/long": Repository({**tiny.files, "model.safetensors": (1 << 40).to_bytes(8, "little") + weights}),
        },
        broken=("acme/broken",),
    )
    home = tmp_path_factory.mktemp("hub-home")
    with hub:
        found = ask([*hub.repositories, "acme/absent", "acme/broken"], home, hub.endpoint)
        found["sent"] = hub.sent_bytes
        hub.ranges = False
        found["whole files"] = ask(["acme/tiny"], home, hub.endpoint)["acme/tiny"]
    return found


def test_headers_from_the_hub_are_those_of_the_file(answers: dict[str, Any], tiny_llama_tied: Path) -> None:
    local = open_source(str(tiny_llama_tied))
    found = answers["acme/tiny"]
    assert found["shapes"] == {name: list(local.shape(name)) for name in local.names()}
    assert found["dtypes"] == ["torch.float32"] and found["tied"]
    assert found["weights"] == [], "no weight file is fetched"


def test_a_large_model_is_known_without_its_weights(answers: dict[str, Any]) -> None:
    expected = {name: list(shape) for name, shape in tensors().items()}
    assert answers["acme/large"]["shapes"] == expected
    # the others' configs and tokenizers are in there; the 141 GB of weights are not
    assert answers["sent"] < 3_000_000


def test_shapes_by_the_config_where_the_hub_has_no_safetensors(answers: dict[str, Any], tiny_llama_tied: Path) -> None:
    local = open_source(str(tiny_llama_tied))
    found = answers["acme/pickled"]
    assert found["shapes"] == {name: list(local.shape(name)) for name in local.names()}
    assert found["notes"] == ["no weights were found: shapes are those that config.json asks for"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("acme/gated", "access is restricted"),
        ("acme/cut", "acme/cut/model.safetensors: expected"),
        ("acme/long", "acme/long/model.safetensors: not a safetensors file"),
        ("acme/absent", "nor a model that the hub shows"),
        ("acme/broken", "500"),
        ("whole files", "sends whole files only"),
    ],
)
def test_what_the_hub_cannot_give(model: str, message: str, answers: dict[str, Any]) -> None:
    assert message in answers[model]["error"]


def test_a_local_folder_is_the_source_itself(tiny_llama: Path) -> None:
    assert not isinstance(open_headers(str(tiny_llama)), HeaderSource)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_with_a_config_alone(tied: bool, tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path) -> None:
    model = tiny_llama_tied if tied else tiny_llama
    shutil.copy(model / "config.json", tmp_path / "config.json")
    local, found = open_source(str(model)), open_headers(str(tmp_path))
    assert {name: (found.shape(name), found.dtype(name)) for name in found.names()} == {
        name: (local.shape(name), local.dtype(name)) for name in local.names()
    }
    assert found.tied_head == tied
    with pytest.raises(ModelError, match="only the headers"):
        found.read(found.names()[0])
    with pytest.raises(ModelError, match="not its tokenizer"):
        found.tokenizer_folder()


def test_a_config_of_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Nothing"], "model_type": "nothing"}))
    with pytest.raises(ModelError, match="builds no model from config.json"):
        open_headers(str(tmp_path))
