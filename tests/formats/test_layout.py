"""What is known of an artifact's bytes before a weight is read: equal to the file that a run then writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import write_tiny_llama
from quantkit.card import card_files
from quantkit.formats import open_artifact
from quantkit.formats.folder import FolderWriter
from quantkit.formats.layout import folder_layout
from quantkit.formats.safetensors_stream import stream_bytes
from quantkit.jobs import quantize
from quantkit.model.reader import open_source
from quantkit.plan import plan_linears
from quantkit.progress import Progress
from quantkit.recipe import load_recipe

QUICK = ["calibration.sequences=4", "calibration.length=32"]
G32 = "method.group_size=32"
CASES = {
    "int8": ("int8", []),
    "nf4": ("nf4", []),
    "nf4 double": ("nf4-double", []),
    "nf4 with the head, small blocks": ("nf4-double", ["skip=[]", "method.block_size=32", "model.dtype=bfloat16"]),
    "autoawq": ("awq-4bit-g64", [G32]),
    "autoawq, whole rows": ("awq-4bit-g64", ["method.group_size=null"]),
    "autogptq v1": ("gptq-4bit-g64", [G32]),
    "autogptq v2": ("gptq-4bit-g64", [G32, "method.symmetric=false"]),
    "autogptq, three bits": ("rtn-4bit-g128", [G32, "method.bits=3"]),
    "autogptq, mixed": ("rtn-4bit-g128", [G32, 'overrides={"v_proj$": skip, "down_proj$": {bits: 8}}']),
    "compressed-tensors, symmetric": ("gptq-w4a16", [G32]),
    "compressed-tensors, asymmetric": ("awq-w4a16-asym", [G32]),
    "gguf, one type": ("gguf-q8_0", []),
    "gguf, a mix with fallbacks": ("gguf-q4_k_m", []),
    "gguf, calibrated": ("gguf-q4_k_m-gptq", []),
}


@pytest.fixture(scope="module", params=["", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 192 columns: neither 128 nor 256 divides them
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_llama(folder, tied=bool(request.param), hidden_size=192, intermediate_size=256)


@pytest.mark.parametrize("case", CASES)
def test_a_layout_is_what_the_run_writes(case: str, model: Path, tmp_path: Path) -> None:
    name, changes = CASES[case]
    settings = [*QUICK, *changes]
    recipe, source = load_recipe(name, settings), open_source(str(model))
    planned = recipe.resolved_format.layout(source, plan_linears(recipe, source), getattr(torch, recipe.model.dtype))
    manifest = quantize(
        name,
        model=str(model),
        out=tmp_path / "out",
        settings=settings,
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
    )
    artifact = open_artifact(tmp_path / "out")
    assert planned.tensor_bytes == {name: artifact.stored_bytes(name) for name in artifact.names()}
    files = [record.bytes for record in manifest.files if record.name.endswith((".safetensors", ".gguf"))]
    assert planned.files_exact and planned.measure_files() == sum(files)
    names = {*planned.name_files(), *card_files(source)}
    assert names == {record.name for record in manifest.files}


def test_shards_are_counted_as_they_are_written(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_source(str(tiny_llama))
    sizes = {name: 4 * source.read(name).numel() for name in source.names()}
    limit = 100_000
    writer = FolderWriter(
        tmp_path,
        source,
        [],
        torch.float32,
        lambda name, value: {},
        lambda plan: {},
        {},
        max_shard_bytes=limit,
    )
    for name in source.names():
        writer.add(name, source.read(name))
    written = sorted(path for path in writer.finish() if path.suffix == ".safetensors")
    found = stream_bytes([{name: size} for name, size in sizes.items()], limit)
    assert len(found) > 2 and found == [path.stat().st_size for path in written]


def test_several_files_are_not_promised_to_the_byte(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.formats.layout.MAX_SHARD_BYTES", 100_000)
    source = open_source(str(tiny_llama))
    layout = folder_layout(source, [], torch.float16, lambda plan: {})
    assert not layout.files_exact
    files = stream_bytes([{name: size} for name, size in layout.tensor_bytes.items()], 100_000)
    assert layout.measure_files() == sum(files)
    last = f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert {last, "model.safetensors.index.json", "config.json"} <= set(layout.name_files())
