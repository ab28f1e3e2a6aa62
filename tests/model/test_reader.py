"""Folders as sources: equal tensors, headers checked before weights, and one message for each kind of wrong folder."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import ModelError
from quantkit.model import source
from quantkit.model.reader import SafetensorsSource, open_source
from quantkit.model.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def sharded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    target = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(target, max_shard_size="100KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    return target


def header_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_are_those_that_safetensors_reads(tiny_llama: Path) -> None:
    source = open_source(str(tiny_llama))
    expected = load_file(tiny_llama / "model.safetensors")
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        read = source.read(name)
        assert source.shape(name) == tuple(tensor.shape) == tuple(read.shape)
        assert source.dtype(name) == tensor.dtype == read.dtype
        assert torch.equal(read, tensor)
    assert source.parameter_count() == sum(tensor.numel() for tensor in expected.values())
    assert not source.tied_head


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_odd_shapes_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "scalar": torch.tensor(1.5, dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "odd": torch.arange(21, dtype=dtype).reshape(3, 7),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == dtype


def test_what_is_read_is_the_callers_own(folder: Path) -> None:
    source = open_source(str(folder))
    name = source.names()[0]
    before = source.read(name).clone()
    source.read(name).zero_()
    assert torch.equal(source.read(name), before)


def test_parts_are_the_rows_in_order(folder: Path) -> None:
    source = SafetensorsSource(folder)
    for name in source.names():
        whole = source.read(name)
        parts = list(source.in_parts(name, 5))
        assert len(parts) == -(-len(whole) // 5) and torch.equal(torch.cat(parts), whole), name


def test_rows_are_read_a_part_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = SafetensorsSource(folder)
    name = "model.embed_tokens.weight"
    whole = opened.read(name)
    monkeypatch.setattr(source, "PART", 7 * whole.shape[1])
    monkeypatch.setattr(opened, "read", lambda name: pytest.fail("the whole of it"))
    for rows in ([0, 6, 7, 8, 300, len(whole) - 1], [3], list(range(len(whole)))):
        assert torch.equal(opened.read_rows(name, torch.tensor(rows)), whole[rows])
    assert opened.read_rows(name, torch.tensor([], dtype=torch.int64)).shape == (0, whole.shape[1])
    with pytest.raises(IndexError, match=f"row {len(whole)} of {len(whole)}"):
        opened.read_rows(name, torch.tensor([0, len(whole)]))


def test_shards_read_as_one_model_in_the_order_of_their_bytes(sharded: Path, tiny_llama: Path) -> None:
    source, whole = open_source(str(sharded)), open_source(str(tiny_llama))
    assert sorted(source.names()) == sorted(whole.names())
    assert all(torch.equal(source.read(name), whole.read(name)) for name in whole.names())
    in_order = []
    for shard in sorted(sharded.glob("*.safetensors")):
        entries = SafetensorsFile(shard).entries
        assert [entry.start for entry in entries.values()] == sorted(entry.start for entry in entries.values())
        in_order += list(entries)
    assert source.names() == in_order
    assert [file["name"] for file in source.lineage()["files"]] == sorted(path.name for path in sharded.glob("m*-*"))


def test_lineage_holds_hashes_and_side_files_leave_out_what_is_not_carried(folder: Path) -> None:
    import hashlib

    for name in ("README.md", "LICENSE", "NOTICE.txt", "license-extra.md", "notes.txt", "modeling.py"):
        (folder / name).write_text("x")
    source = open_source(str(folder))
    weights = folder / "model.safetensors"
    lineage = source.lineage()
    assert lineage["id"] == "model" and lineage["kind"] == "safetensors" and lineage["revision"] is None
    assert lineage["files"] == [
        {
            "name": "model.safetensors",
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
    ]
    assert source.lineage() is lineage, "hashed once"
    names = {path.name for path in source.side_files()}
    assert names == {
        "LICENSE",
        "NOTICE.txt",
        "license-extra.md",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert source.tokenizer_folder() == folder


def test_opening_does_not_read_weights(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    size = 8 << 30
    header = {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    path = header_file(tmp_path / "model.safetensors", header)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + size)  # sparse: it takes no space
    tracemalloc.start()
    source = open_source(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.shape("w") == (size // 4,)
    assert peak < 1 << 20


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_weights_say_expected_and_found(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - cut)
    with pytest.raises(ModelError, match=f"expected {size} bytes by its header, found {size - cut}") as caught:
        open_source(str(folder))
    assert caught.value.exit_code == 3 and "download" in str(caught.value.hint)


def test_a_file_that_shrinks_while_in_use_is_an_error(folder: Path) -> None:
    source = open_source(str(folder))
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(ModelError, match="changed while in use"):
        source.read(source.names()[-1])


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, 12, "b overlaps a"),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20, "leaves unused bytes after a"),
        ({"a": {**F32, "shape": [3]}}, 8, "holds 8 bytes, expected 12"),
        ({"a": {**F32, "shape": [-2]}}, 8, "expected a list of sizes"),
        ({"a": {**F32, "shape": [True, 2]}}, 8, "expected a list of sizes"),
        ({"a": {**F32, "shape": [2**62] * 9}}, 8, "expected a list of sizes"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, 8, "expected \\[begin, end\\]"),
        ({"a": {**F32, "data_offsets": [0, 2**70]}}, 8, "expected \\[begin, end\\]"),
        ({"a": {**F32, "data_offsets": [0, 8.0]}}, 8, "expected \\[begin, end\\]"),
        ({"a": {"dtype": "F32"}}, 8, "expected an object with dtype"),
        ({"a": {**F32, "dtype": ["F32"]}}, 8, "stored as"),
        ({"a": {**F32, "dtype": "F4"}}, 8, "stored as F4"),
        ({"a": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}, 8, "stored as I32"),
        ({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, 8, "stored as F8_E4M3"),
        ({"a": F32}, 20, "bytes by its header, found"),
        ([1], 0, "the header is a list"),
        (b'{"a": 1, "a": 2}', 0, "given twice"),
        (b"{nonsense", 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = header_file(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(ModelError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected 8 bytes of header length, found 0"),
        (b"version https://git-lfs.example/spec/v1\n", "not a safetensors file"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}", f"expected {MAX_HEADER_BYTES + 8} bytes or more"),
    ],
)
def test_a_header_length_is_checked_before_it_is_used(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ModelError, match=message):
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, "nothing of the claimed size was allocated"


def test_all_tensors_of_a_wrong_dtype_are_named_at_once(tmp_path: Path) -> None:
    save_file({name: torch.zeros(4, dtype=torch.int8) for name in ("a", "b")}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError) as caught:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert [": a: " in line or ": b: " in line for line in caught.value.message.splitlines()] == [True, True]
    assert "already quantized" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", ".x.safetensors", 7],
)
def test_an_index_cannot_reach_outside_its_folder(folder: Path, name: Any) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match="files of the same folder") as caught:
        open_source(str(folder))
    assert "do not use" in str(caught.value.hint)


def break_sharded(change: Callable[[Path, dict[str, str]], dict[str, str]], sharded: Path, target: Path) -> Path:
    copy = Path(shutil.copytree(sharded, target / "sharded"))
    index = copy / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": change(copy, weight_map)}))
    return copy


def remove_first_shard(copy: Path, weight_map: dict[str, str]) -> dict[str, str]:
    sorted(copy.glob("model-*"))[0].unlink()
    return weight_map


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_first_shard, "1 of . shards are missing: model-00001"),
        (
            lambda copy, weight_map: {**weight_map, "ghost": min(weight_map.values())},
            "do not hold: ghost in model-00001",
        ),
        (lambda copy, weight_map: {}, "weight_map: expected a file name"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(sharded: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(str(break_sharded(change, sharded, tmp_path)))


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (pickle_instead, "pickled weights \\(pytorch_model.bin\\)", "save_pretrained"),
        (quantized, "already quantized \\(gptq\\)", "made from"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json beside the weights", "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON", "incomplete"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: a list, expected an object", None),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "a.safetensors"),
            "found a.safetensors",
            "adapter",
        ),
    ],
)
def test_wrong_folders(folder: Path, change: Callable[[Path], None], message: str, hint: str | None) -> None:
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(str(folder))
    assert caught.value.exit_code == 3
    assert (hint or "") in str(caught.value.hint)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "no model"),
        ("/no/such/folder", "no such file or folder"),
        ("./missing", "no such file or folder"),
        ("gpt2", "no such file or folder"),
        ("owner/name.gguf", "no such file"),
        ("a/b/c", "no such file or folder"),
        ("spaces in/name", "no such file or folder"),
    ],
)
def test_names_that_are_neither_path_nor_id(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_source(model)
    assert "OWNER/NAME" in str(caught.value.hint)


def test_files_that_are_not_models(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights") as caught:
        open_source(str(tmp_path / "x.pt"))
    assert "save_pretrained" in str(caught.value.hint)
    with pytest.raises(ModelError, match="a file, expected a folder") as caught:
        open_source(str(tiny_llama / "model.safetensors"))
    assert str(tiny_llama) in str(caught.value.hint)


def test_a_gguf_is_handed_to_its_own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quantkit.model.gguf_source as gguf_source

    opened: list[Path] = []
    monkeypatch.setattr(gguf_source, "GGUFSource", opened.append)
    (tmp_path / "a.gguf").write_bytes(b"")
    open_source(str(tmp_path / "a.gguf"))
    open_source(str(tmp_path))
    assert opened == [tmp_path / "a.gguf"] * 2
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="2 .gguf files: a.gguf, b.gguf"):
        open_source(str(tmp_path))


def test_a_config_beside_a_gguf_means_the_folder(folder: Path) -> None:
    (folder / "extra.gguf").write_bytes(b"")
    assert isinstance(open_source(str(folder)), SafetensorsSource)


def test_a_missing_tensor_and_a_missing_tokenizer_are_named(folder: Path) -> None:
    source = open_source(str(folder))
    with pytest.raises(ModelError, match="holds no tensor ghost"):
        source.read("ghost")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        source.tokenizer_folder()


def test_a_tied_model_stores_no_head(tiny_llama_tied: Path) -> None:
    source = open_source(str(tiny_llama_tied))
    assert source.tied_head and "lm_head.weight" not in source.names()
