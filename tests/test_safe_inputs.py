"""What models and recipes from elsewhere cannot do: run code, name files elsewhere, take memory by a number."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fakes.mutations import gguf_key
from quantkit.errors import ModelError, QuantkitError, RecipeError
from quantkit.jobs import quantize
from quantkit.manifest import read_manifest
from quantkit.model.calibration_sets import find_set
from quantkit.model.gguf_file import GGUFFile
from quantkit.model.reader import open_source
from quantkit.model.sequences import load_tokenizer
from quantkit.progress import Progress
from quantkit.recipe import load_recipe, load_suite
from quantkit.verification import verify

CODE = """
from pathlib import Path

from transformers import PreTrainedTokenizerFast

Path({mark!r}).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_of_a_tokenizer_runs_only_when_trusted_and_the_manifest_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "code was run"
    (folder / "tokenization_own.py").write_text(CODE.format(mark=str(mark)))
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change_json(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")

    def make(trust: bool) -> Any:
        return quantize(
            "gptq-4bit-g64",
            model=str(folder),
            out=tmp_path / "out",
            settings=["calibration.sequences=2", "calibration.length=32", "method.refine=0"],
            device="cpu",
            force=False,
            progress=Progress(quiet=True),
            trust_remote_code=trust,
        )

    with pytest.raises(ModelError, match="auto_map: the tokenizer is code") as caught:
        make(False)
    assert "--trust-remote-code" in str(caught.value.hint) and not mark.exists()
    assert not (tmp_path / "out").exists()
    make(True)
    assert mark.exists()
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest.source["trust_remote_code"] is True
    assert (tmp_path / "out" / "tokenization_own.py").is_file() and verify(tmp_path / "out").passed


def test_a_model_that_is_code_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["OwnForCausalLM"], auto_map={"AutoModel": "x.Y"})
    with pytest.raises(
        ModelError, match="auto_map: OwnForCausalLM is code of the repository's own, which is never run"
    ):
        open_source(str(folder), trust_remote_code=True)
    change_json(folder / "config.json", architectures=["LlamaForCausalLM"])
    assert open_source(str(folder)).names(), "a known family needs no code, whatever the file offers"


def sharded(folder: Path) -> Path:
    """The same model with an index in place of one file."""
    weights = folder / "model.safetensors"
    header = weights.read_bytes()
    names = [name for name in json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]) if name[0] != "_"]
    weights.rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model-1.safetensors"


def test_shards_that_are_links(folder: Path, tmp_path: Path) -> None:
    shard = sharded(folder)
    outside = shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(outside)
    with pytest.raises(ModelError, match="links that lead out of the folder: model-1.safetensors"):
        open_source(str(folder))
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot, ignore=lambda _, names: [name for name in names if name.startswith("model-1")])
    shutil.copy(outside, blobs / "abc")
    (snapshot / "model-1.safetensors").symlink_to(Path("../../blobs/abc"))
    assert open_source(str(snapshot)).names()


@pytest.mark.parametrize("name", ["../recipe.yaml", "a/../../recipe.yaml", "/etc/recipe.yaml"])
def test_a_suite_names_recipes_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text("method: {name: int8}")
    suite = tmp_path / "inner" / "suite.yaml"
    suite.parent.mkdir()
    suite.write_text(f"name: x\nrecipes: [{{recipe: {name}}}]\nbench: [{{name: memory}}]\n")
    with pytest.raises(RecipeError, match="leads out of the folder of the suite"):
        load_suite(suite)


@pytest.mark.parametrize("name", ["../text.txt", "/etc/text.txt"])
def test_a_calibration_definition_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "set.yaml").write_text(f"files: [{name}]\n")
    with pytest.raises(RecipeError, match="expected a file in the folder of the definition"):
        find_set(str(tmp_path / "set.yaml"))


def test_a_pattern_that_would_take_for_ever_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("method: {name: int8}\nskip: ['(a+)+$']\noverrides: {'(\\w+\\.?)*!': skip}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.message.count("could take for ever") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected an integer from 1 to 2000"),
        ({"hidden_size": "64"}, 'hidden_size: found "64", expected an integer'),
        ({"architectures": 5}, "architectures: found 5, expected a list of texts"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: found NaN, expected a number above 0"),
        ({"rope_parameters": {"rope_theta": []}}, r"rope_parameters: rope_theta: found \[\], expected a number"),
        ({"num_attention_heads": 65, "head_dim": None}, "num_attention_heads: found 65, expected 64 or fewer"),
    ],
)
def test_settings_of_a_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        open_source(str(folder))


def test_a_tokenizer_that_is_too_large_is_refused(folder: Path) -> None:
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(200_000_000)
    with pytest.raises(ModelError, match=r"tokenizer\.json: 200000000 bytes, expected 100000000 or fewer"):
        load_tokenizer(folder)


def gguf(path: Path, *keys: bytes, tensors: int = 0, after: bytes = b"") -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys) + after)
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([gguf_key("x", 9, struct.pack("<IQ", 9, 1) * 5000)], "a list of lists"),
        ([gguf_key("x", 9, struct.pack("<IQ", 8, 2**62))], "the header needs at least"),
        ([gguf_key("x", 9, struct.pack("<IQ", 0, 2**63))], "the header needs at least"),
        ([gguf_key("x", 8, struct.pack("<Q", 2**62))], "the header needs at least"),
        ([gguf_key("x", 7, b"\1"), gguf_key("x", 7, b"\0")], "x: given twice"),
        ([gguf_key("general.alignment", 8, struct.pack("<Q", 1) + b"a")], "general.alignment: a; expected"),
        ([gguf_key("general.alignment", 10, struct.pack("<Q", 2**63))], "general.alignment: 9223372036854775808"),
        ([gguf_key("tokenizer.ggml.tokens", 4, bytes(4))], "tokenizer.ggml.tokens: found 0, expected a list of texts"),
    ],
)
def test_headers_of_gguf(tmp_path: Path, keys: list[bytes], message: str) -> None:
    path = gguf(tmp_path / "x.gguf", *keys, after=bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message):
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_text_or_a_list_larger_than_any_model_has(tmp_path: Path) -> None:
    path = gguf(tmp_path / "x.gguf", gguf_key("x", 8, struct.pack("<Q", 1 << 30)))
    with path.open("ab") as file:
        file.truncate(2 << 30)  # a hole: takes no disk
    with pytest.raises(ModelError, match="1073741824 bytes of a text, expected 16777216 or fewer"):
        GGUFFile(path)


def tensor(name: str, sizes: tuple[int, ...], offset: int) -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return struct.pack("<Q", len(name)) + name.encode() + shape + struct.pack("<IQ", 0, offset)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (tensor("a", (8,), 0) + tensor("a", (8,), 32), "a: given twice among the tensors"),
        (tensor("a", (16,), 0) + tensor("b", (8,), 32), "b overlaps a"),
        (tensor("a", (0,), 0) + tensor("b", (8,), 32), r"a: sizes \[0\]; expected none of 0"),
        (tensor("a", (), 0) + tensor("b", (8,), 32), "a: 0 dimensions; expected 1 to 4"),
        (tensor("a", (2**62, 2**62), 0) + tensor("b", (8,), 32), "lie beyond the end of the file"),
    ],
)
def test_tensors_of_gguf(tmp_path: Path, table: bytes, message: str) -> None:
    path = gguf(tmp_path / "x.gguf", tensors=2, after=table + bytes(500))
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(QuantkitError, match="pickled weights") as caught:
            open_source(str(path))
        assert "save_pretrained" in str(caught.value.hint)
