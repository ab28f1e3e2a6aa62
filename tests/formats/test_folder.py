"""The folder that safetensors formats share, with a format of the test's own: one byte a code, nothing packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import write_tiny_llama
from quantkit.errors import DataError, ModelError
from quantkit.formats import folder as folder_module
from quantkit.formats.base import LinearPlan
from quantkit.formats.folder import FolderArtifact, FolderWriter, read_quantization_config
from quantkit.formats.layout import Shapes
from quantkit.maths.affine import quantize_nearest
from quantkit.methods.rtn import RTN
from quantkit.model.reader import SafetensorsSource
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor

GRID = Grid(8, 16, symmetric=True)
QUANTIZED = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")


def pack(weight_name: str, value: QuantizedTensor) -> dict[str, Tensor]:
    assert isinstance(value, GroupTensor)
    module = weight_name.removesuffix(".weight")
    return {f"{module}.qweight": value.codes, f"{module}.scales": value.scale}


def layout(plan: LinearPlan) -> Shapes:
    groups = plan.in_features // 16
    return {
        f"{plan.name}.qweight": (torch.uint8, (plan.out_features, plan.in_features)),
        f"{plan.name}.scales": (torch.float32, (plan.out_features, groups)),
    }


class PlainArtifact(FolderArtifact):
    format_name = "plain"

    def unpack(self, weight_name: str, get: Callable[[str], Tensor]) -> QuantizedTensor | None:
        module = weight_name.removesuffix(".weight")
        return GroupTensor(get(f"{module}.qweight"), get(f"{module}.scales"), None, GRID)


def plans_of(source: SafetensorsSource) -> list[LinearPlan]:
    method = RTN(bits=8, group_size=16, symmetric=True)
    return [LinearPlan(name, *source.shape(f"{name}.weight"), method) for name in QUANTIZED]  # type: ignore[call-arg]


def write(
    source: SafetensorsSource, out: Path, dtype: torch.dtype = torch.float16, **settings: Any
) -> tuple[list[Path], dict[str, int]]:
    """Store the two linears quantized and the rest as it is; the paths and the bytes of each tensor."""
    out.mkdir(parents=True)
    writer = FolderWriter(out, source, plans_of(source), dtype, pack, layout, {"quant_method": "plain"}, **settings)
    stored = {}
    for name in source.names():
        value: Tensor | QuantizedTensor = source.read(name)
        if name.removesuffix(".weight") in QUANTIZED:
            assert isinstance(value, Tensor)
            value = quantize_nearest(value.float(), GRID)
        stored[name] = writer.add(name, value)
    return writer.finish(), stored


def test_what_was_written_is_read_back(tiny_llama: Path, tmp_path: Path) -> None:
    source = SafetensorsSource(tiny_llama)
    _, stored = write(source, tmp_path / "out")
    artifact = PlainArtifact(tmp_path / "out")
    assert set(artifact.names()) == set(source.names())
    for name in source.names():
        assert artifact.shape(name) == source.shape(name)
        assert artifact.stored_bytes(name) == stored[name]
        weight = source.read(name)
        if name.removesuffix(".weight") in QUANTIZED:
            expected = quantize_nearest(weight.float(), GRID)
            found = artifact.quantized(name)
            assert isinstance(found, GroupTensor)
            assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
            assert artifact.dtype(name) == artifact.read(name).dtype == torch.float32
            assert torch.equal(artifact.read(name), expected.dequantize())
            assert stored[name] == weight.numel() + 4 * weight.numel() // 16
        else:
            assert artifact.quantized(name) is None
            assert artifact.dtype(name) == torch.float16
            assert torch.equal(artifact.read(name), weight.half())
            assert stored[name] == 2 * weight.numel()
    assert artifact.parameter_count() == source.parameter_count()


def test_config_keeps_the_source_and_adds_dtype_and_quantization(tiny_llama: Path, tmp_path: Path) -> None:
    source = SafetensorsSource(tiny_llama)
    write(source, tmp_path / "out", torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    added = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "plain"}}
    assert config == {**source.config, **added}
    from transformers import AutoConfig

    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_side_files_arrive_byte_for_byte(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in tiny_llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "LICENSE").write_bytes("Lizenz\r\n\xe4".encode("latin-1"))
    (copy / "notes.txt").write_text("not a side file")
    source = SafetensorsSource(copy)
    paths, _ = write(source, tmp_path / "out", extra_files={"quantize_config.json": b"{}"})
    names = {path.name for path in source.side_files()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} <= names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (copy / name).read_bytes()
    assert {path.name for path in paths} == names | {"config.json", "model.safetensors", "quantize_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in paths}
    artifact = PlainArtifact(tmp_path / "out")
    assert {path.name for path in artifact.side_files()} == names
    assert artifact.tokenizer_folder() == tmp_path / "out"


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", tied=True)
    tensors = load_file(folder / "model.safetensors")
    # some checkpoints store the tied head a second time
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(folder)
    _, stored = write(source, tmp_path / "out")
    assert stored["lm_head.weight"] == 0
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert PlainArtifact(tmp_path / "out").tied_head


def test_a_head_that_the_config_does_not_call_tied_but_is_missing(tiny_llama_tied: Path, tmp_path: Path) -> None:
    source = SafetensorsSource(tiny_llama_tied)
    del source.config["tie_word_embeddings"]
    write(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_rotary_tables_of_old_checkpoints_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    source = SafetensorsSource(tiny_llama)
    writer = FolderWriter(tmp_path, source, plans_of(source), torch.float16, pack, layout, {})
    assert writer.add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)) == 0


def test_a_tensor_that_is_not_as_planned_is_a_bug(tiny_llama: Path, tmp_path: Path) -> None:
    source = SafetensorsSource(tiny_llama)
    writer = FolderWriter(tmp_path, source, plans_of(source), torch.float16, pack, layout, {})
    name = f"{QUANTIZED[0]}.weight"
    wider = Grid(8, 8, True)  # twice the scales
    with pytest.raises(AssertionError, match=f"{name}: planned as"):
        writer.add(name, quantize_nearest(source.read(name).float(), wider))


def test_a_tensor_that_never_came_is_a_bug(tiny_llama: Path, tmp_path: Path) -> None:
    source = SafetensorsSource(tiny_llama)
    writer = FolderWriter(tmp_path, source, plans_of(source), torch.float16, pack, layout, {})
    for name in source.names()[1:]:
        if name.removesuffix(".weight") not in QUANTIZED:
            writer.add(name, source.read(name))
    for linear in QUANTIZED:
        writer.add(f"{linear}.weight", quantize_nearest(source.read(f"{linear}.weight").float(), GRID))
    with pytest.raises(AssertionError, match=f"never written: {source.names()[0]}"):
        writer.finish()


def test_shards_are_read_back(tiny_llama: Path, tmp_path: Path) -> None:
    source = SafetensorsSource(tiny_llama)
    paths, _ = write(source, tmp_path / "out", max_shard_bytes=60_000)
    assert sum(path.suffix == ".safetensors" for path in paths) > 2
    write(source, tmp_path / "whole")
    one, many = PlainArtifact(tmp_path / "whole"), PlainArtifact(tmp_path / "out")
    assert set(one.names()) == set(many.names())
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())


def test_lineage_names_and_hashes_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    write(SafetensorsSource(tiny_llama), tmp_path / "out")
    lineage = PlainArtifact(tmp_path / "out").lineage()
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert lineage["files"] == [{"name": "model.safetensors", "bytes": len(content), "sha256": digest}]
    assert (lineage["kind"], lineage["id"]) == ("artifact", "out")


def test_damaged_artifacts(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(SafetensorsSource(tiny_llama), out)
    weights = out / "model.safetensors"
    tensors = load_file(weights)
    scales = f"{QUANTIZED[0]}.scales"
    save_file({name: tensor for name, tensor in tensors.items() if name != scales}, weights)
    artifact = PlainArtifact(out)
    with pytest.raises(ModelError, match=f"holds no tensor {scales}"):
        artifact.read(f"{QUANTIZED[0]}.weight")
    with pytest.raises(ModelError, match="holds no tensor model.nothing"):
        artifact.read("model.nothing")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="expected .* bytes by its header"):
        PlainArtifact(out)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json: no quantization_config"):
        PlainArtifact(out)


def test_quantization_config_is_found_or_not(tiny_llama: Path, tmp_path: Path) -> None:
    write(SafetensorsSource(tiny_llama), tmp_path / "out")
    assert read_quantization_config(tmp_path / "out") == {"quant_method": "plain"}
    assert read_quantization_config(tiny_llama) is None
    assert read_quantization_config(tmp_path) is None
    assert read_quantization_config(tmp_path / "out" / "model.safetensors") is None


def test_a_full_disk_while_side_files_are_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folder_module, "write_atomic", full)
    with pytest.raises(DataError, match=r"no space left: needed [\d.]+ MB more, free [\d.]+ MB"):
        write(SafetensorsSource(tiny_llama), tmp_path / "out")
