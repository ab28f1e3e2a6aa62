"""What an artifact's card says, on tiny models: read back as the hub, a person and quantkit itself would read it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from card.test_licence import MIT
from quantkit import cli
from quantkit.card.loading import load_loadings, loadings_of
from quantkit.card.text import NOT_MEASURED
from quantkit.errors import ModelError, UsageError
from quantkit.formats import FORMATS
from quantkit.jobs import quantize
from quantkit.manifest import Manifest, read_manifest
from quantkit.model.front_matter import front_matter
from quantkit.progress import Progress
from quantkit.recipe import load_recipe
from quantkit.verification import verify
from report.results_samples import results, row

SMALL = ["calibration.sequences=4", "calibration.length=64"]
CARD = """---
license: other
license_name: tiny-community
license_link: LICENSE
language: [en, "no"]
base_model: acme/pretrained
tags: [their-own]
---

# Tiny
"""


def make(recipe: str, model: Path, out: Path, *settings: str) -> Manifest:
    quiet = Progress(quiet=True)
    return quantize(
        recipe, model=str(model), out=out, settings=[*SMALL, *settings], device="cpu", force=False, progress=quiet
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("card") / "tiny"
    shutil.copytree(tiny_llama, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("our terms")
    (folder / "NOTICE.txt").write_text("who made it")
    return folder


RECIPES = {
    "nf4": ("nf4",),
    "rtn": ("rtn-4bit-g128", "method.group_size=32", 'overrides={"q_proj$": {bits: 8}}'),
    "gguf": ("gguf-q4_0",),
}


class Artifacts(dict[str, Path]):
    """The artifacts of RECIPES by name, each made when a test first asks for it."""

    def __init__(self, model: Path, folder: Path):
        super().__init__()
        self._model, self._folder = model, folder

    def __missing__(self, name: str) -> Path:
        recipe, *settings = RECIPES[name]
        make(recipe, self._model, self._folder / name, *settings)
        return self.setdefault(name, self._folder / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Artifacts:
    return Artifacts(model, tmp_path_factory.mktemp("artifacts"))


def text_of(artifact: Path) -> str:
    return (artifact / "README.md").read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["nf4", "rtn", "gguf"])
def test_card_and_licence_files_are_part_of_the_artifact(name: str, made: dict[str, Path], model: Path) -> None:
    manifest = read_manifest(made[name])
    assert manifest is not None
    names = [record.name for record in manifest.files]
    assert {"README.md", "LICENSE", "NOTICE.txt"} <= set(names) and len(names) == len(set(names))
    assert set(names) | {"quantkit.json"} == {path.name for path in made[name].iterdir()}
    assert verify(made[name]).findings == []
    for side in ("LICENSE", "NOTICE.txt"):
        assert (made[name] / side).read_bytes() == (model / side).read_bytes()


def test_the_front_matter_is_what_a_hub_reads(made: dict[str, Path]) -> None:
    head = front_matter(made["nf4"])
    assert head == yaml.safe_load(text_of(made["nf4"]).split("---\n")[1])
    assert head == {
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny-community",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "tags": ["quantkit", "nf4", "bitsandbytes"],
    }, "the card of a local folder does not tell the folder's own id"
    assert front_matter(made["gguf"])["library_name"] == "gguf"
    assert front_matter(made["rtn"])["tags"] == ["quantkit", "rtn", "autogptq", "4-bit"]


@pytest.mark.parametrize("name", ["nf4", "rtn", "gguf"])
def test_the_recipe_of_a_card_makes_the_artifact_again(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    (recipe,) = fenced(text_of(made[name]), "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    manifest = read_manifest(made[name])
    assert manifest is not None
    assert load_recipe(path).model_dump(mode="json") == manifest.recipe


def test_a_source_from_a_hub_is_named_with_its_commit(made: dict[str, Path]) -> None:
    from quantkit.card.licence import Licence
    from quantkit.card.text import card_text

    manifest = read_manifest(made["nf4"])
    assert manifest is not None
    source = {**manifest.source, "id": "acme/tiny", "revision": "0123abc"}
    text = card_text(manifest.model_copy(update={"source": source}), {"base_model": "acme/tiny"}, Licence("mit."))
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("acme/tiny", "quantized")
    assert "license" not in head
    assert "[acme/tiny](https://huggingface.co/acme/tiny), quantized by" in text
    assert "| source | `acme/tiny` at `0123abc` |" in text
    model = yaml.safe_load(fenced(text, "yaml")[0])["model"]
    assert model == {"id": "acme/tiny", "revision": "0123abc", "dtype": "float16"}


def test_equal_runs_give_equal_cards(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    make("nf4", model, tmp_path / "again")
    assert text_of(tmp_path / "again") == text_of(made["nf4"])


def test_the_facts_are_those_of_the_manifest(made: dict[str, Path]) -> None:
    text, manifest = text_of(made["rtn"]), read_manifest(made["rtn"])
    assert manifest is not None
    weights = (made["rtn"] / "model.safetensors").stat().st_size
    for line in (
        "| source | `tiny` |",
        "| bits | 4 |",
        "| group size | 32 |",
        "| calibration | none |",
        f"| bits per weight, quantized layers | {manifest.bits_per_weight:.2f} |",
        f"| weights | {weights:,} bytes |",
        "- lm_head: not quantized",
        NOT_MEASURED,
        "other (tiny-community), as the source itself says.",
    ):
        assert line in text


def test_every_format_has_engines_and_every_snippet_is_a_program(made: dict[str, Path]) -> None:
    known = load_loadings()
    assert known.keys() == FORMATS.keys()
    for loading in (it for loadings in known.values() for it in loadings if it.language == "python"):
        compile(loading.code, loading.engine, "exec")
    (file,) = made["gguf"].glob("*.gguf")
    shell = "".join(fenced(text_of(made["gguf"]), "sh"))
    assert f"llama-cli -m {file.name} " in shell and f"FROM ./{file.name}" in shell and "FILE" not in shell


@pytest.mark.parametrize(
    ("method", "overrides", "served"),
    [
        ({"bits": 4, "symmetric": True}, {}, True),
        ({"bits": 8, "symmetric": True}, {"q_proj": {"bits": 4}, "v_proj": "skip"}, True),
        ({"bits": 3, "symmetric": True}, {}, False),
        ({"bits": 4, "symmetric": False}, {}, False),
        ({"bits": 4, "symmetric": True}, {"q_proj": {"bits": 2}}, False),
    ],
)
def test_an_engine_that_refuses_the_file_is_not_offered(
    method: dict[str, Any], overrides: dict[str, Any], served: bool, made: dict[str, Path]
) -> None:
    manifest = read_manifest(made["rtn"])
    assert manifest is not None
    changed = manifest.model_copy(update={"recipe": {"method": method, "overrides": overrides}})
    engines = {loading.engine for loading in loadings_of(changed)}
    assert ("vLLM" in engines, "SGLang" in engines) == (served, served)
    assert "transformers" in engines


def test_the_snippet_for_transformers_runs(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    snippet = fenced(text_of(made["nf4"]), "python")[0].replace("ARTIFACT", str(made["nf4"]))
    exec(compile(snippet, "card.py", "exec"), {})
    assert capsys.readouterr().out.strip()


# filled with results


@pytest.fixture
def artifact(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["nf4"], tmp_path / "nf4")


def measured_row(artifact: Path, label: str = "NF4") -> Any:
    manifest = read_manifest(artifact)
    assert manifest is not None
    return row(label).model_copy(update={"artifact": artifact.name, "method": manifest.method})


def test_results_fill_the_table_and_the_manifest_follows(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(results(row("INT8"), measured_row(artifact)).model_dump_json())
    before = text_of(artifact)
    assert cli.execute(["card", str(artifact), "--results", str(path)]) == 0
    text, manifest = text_of(artifact), read_manifest(artifact)
    assert manifest is not None and verify(artifact).findings == []
    assert "| NF4 " in text and "| FP16 |" in text and "INT8" not in text and NOT_MEASURED not in text
    assert text.partition("<!-- measured -->")[0] == before.partition("<!-- measured -->")[0]
    assert text.partition("<!-- /measured -->")[2] == before.partition("<!-- /measured -->")[2]
    assert cli.execute(["card", str(artifact), "--results", str(path)]) == 0
    assert text_of(artifact) == text, "filling again replaces the table"


def test_an_edited_card_is_taken_over_when_asked(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest is not None
    (artifact / "README.md").write_text(text_of(artifact) + "\nA word of our own.\n")
    assert [Path(line.partition(":")[0]).name for line in verify(artifact).findings] == ["README.md"]
    assert cli.execute(["card", str(artifact)]) == 0
    manifest = read_manifest(artifact)
    assert manifest is not None and verify(artifact).findings == []


def test_other_results_are_refused(artifact: Path, tmp_path: Path) -> None:
    from quantkit.card import fill_card

    with pytest.raises(UsageError, match="0 rows of an artifact nf4; it has INT8"):
        fill_card(artifact, results(row("INT8")))
    other = measured_row(artifact).model_copy(update={"method": "gptq 4-bit"})
    with pytest.raises(UsageError, match="row NF4 is gptq 4-bit, the artifact nf4"):
        fill_card(artifact, results(other))
    (artifact / "README.md").write_text("all new")
    with pytest.raises(ModelError, match="no <!-- measured -->"):
        fill_card(artifact, results(measured_row(artifact)))
    with pytest.raises(UsageError, match="no quantkit.json"):
        fill_card(tmp_path, None)


def test_licence_metadata_of_a_gguf_file_are_carried_on(made: dict[str, Path], tmp_path: Path) -> None:
    """The file says under which licence it is, since its source did; an artifact made from it says so too."""
    (file,) = made["gguf"].glob("*.gguf")
    make("nf4", file, tmp_path / "out")
    assert front_matter(tmp_path / "out")["license"] == "other"


def test_a_plain_licence_file_is_enough(tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "LICENSE").write_text(MIT)
    make("nf4", model, tmp_path / "out")
    assert front_matter(tmp_path / "out")["license"] == "mit"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# no head",
        b"---\nlicense: mit",
        b"---\n- a\n---\n",
        b"---\na: [\n---\n",
        b"\xff\xfe\x00",
        b"---\n*x\n---",
    ],
)
def test_a_source_card_that_cannot_be_read_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert front_matter(tmp_path) == {}
