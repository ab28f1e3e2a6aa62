"""compressed-tensors files and the package itself, bit for bit: it reads what is written here, and the other way round.

Runs where the package is installed, as in requirements.lock, and is skipped elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("compressed_tensors", reason="the extra `compressed-tensors` is not installed")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.utils.match import match_targets  # noqa: E402

from quantkit.formats import open_artifact  # noqa: E402
from quantkit.formats.compressed_tensors import CompressedTensorsArtifact, pack_weight, unpack_weight  # noqa: E402
from quantkit.jobs import quantize  # noqa: E402
from quantkit.progress import Progress  # noqa: E402
from quantkit.tensors import Grid, GroupTensor  # noqa: E402

SHAPES = [(1, 1, None), (7, 45, 9), (33, 50, None), (64, 96, 32)]


def _random(bits: int, symmetric: bool, out_features: int, in_features: int, group_size: int | None) -> GroupTensor:
    generator = torch.Generator().manual_seed(bits + out_features)
    grid = Grid(bits, group_size, symmetric)
    size = (out_features, grid.groups(in_features))
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, size, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(size, generator=generator) * 0.05 + 0.001).half().float()
    return GroupTensor(codes, scale, None if symmetric else zero, grid)


def _scheme(grid: Grid) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy="group" if grid.group_size else "channel",
        group_size=grid.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_decodes_our_words(shape: tuple[int, int, int | None], symmetric: bool, bits: int) -> None:
    tensor = _random(bits, symmetric, *shape)
    parts = {name.removeprefix("m."): part for name, part in pack_weight("m.weight", tensor).items()}
    # in the dtype of the scales: what float16 makes of the same products
    stored = PackedQuantizationCompressor.decompress(parts, _scheme(tensor.grid))["weight"]
    assert stored.dtype == torch.float16 and torch.equal(stored, tensor.dequantize().half())
    parts["weight_scale"] = parts["weight_scale"].float()
    exact = PackedQuantizationCompressor.decompress(parts, _scheme(tensor.grid))["weight"]
    assert exact.dtype == torch.float32 and torch.equal(exact, tensor.dequantize())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_words_are_ours_both_ways(shape: tuple[int, int, int | None], symmetric: bool, bits: int) -> None:
    tensor = _random(bits, symmetric, *shape)
    given = {"weight": tensor.dequantize(), "weight_scale": tensor.scale}
    if tensor.zero is not None:
        given["weight_zero_point"] = (tensor.zero.int() - 2 ** (bits - 1)).to(torch.int8)
    words = PackedQuantizationCompressor.compress(given, _scheme(tensor.grid))
    for name, part in pack_weight("m.weight", tensor).items():
        assert torch.equal(words.pop(name.removeprefix("m.")).to(part.dtype), part), name
    assert not words
    given = {name.removeprefix("m."): part for name, part in pack_weight("m.weight", tensor).items()}
    found = unpack_weight("m", given, tensor.grid)
    assert torch.equal(found.dequantize(), tensor.dequantize())


def _make(model: Path, out: Path, method: dict[str, Any], **more: Any) -> CompressedTensorsArtifact:
    """An artifact through the whole pipeline."""
    recipe = {"method": method, "format": {"name": "compressed-tensors"}, **more}
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps({**recipe, "calibration": {"sequences": 4, "length": 64}}))
    quantize(
        str(path), model=str(model), out=out, settings=[], device="cpu", force=False, progress=Progress(quiet=True)
    )
    artifact = open_artifact(out)
    assert isinstance(artifact, CompressedTensorsArtifact)
    return artifact


OVERRIDES = {"down_proj": {"bits": 8, "group_size": None}, r"layers\.1.*v_proj": "skip"}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ({"name": "gptq", "bits": 4, "group_size": 32}, {}),
        ({"name": "gptq", "bits": 3, "group_size": 16, "symmetric": False}, {}),
        ({"name": "awq", "group_size": 32}, {}),
        ({"name": "rtn", "bits": 8, "group_size": None, "symmetric": True}, {"skip": []}),
        ({"name": "rtn", "bits": 4, "group_size": 32}, {"overrides": OVERRIDES}),
    ],
)
def test_it_reads_our_folders(method: dict[str, Any], more: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    """By its own parsing of config.json and its own matching of targets, tensor by tensor."""
    artifact = _make(tiny_llama, tmp_path / "out", method, **more)
    config = QuantizationConfig.model_validate(artifact.quantization)
    by_target = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    linear, seen = torch.nn.Linear(1, 1), 0
    for name in artifact.names():
        module = name.removesuffix(".weight")
        matched = match_targets(module, linear, by_target)
        if not artifact.is_quantized(name):
            assert not name.endswith("proj.weight") or module in config.ignore
            continue
        assert module not in config.ignore
        local = {key.removeprefix(f"{module}."): part for key, part in stored.items() if key.startswith(f"{module}.")}
        local["weight_scale"] = local["weight_scale"].float()
        decoded = PackedQuantizationCompressor.decompress(local, by_target[matched[0]])["weight"]
        assert torch.equal(decoded, artifact.read(name)), name
        seen += 1
    assert seen == 14 + ("skip" in more) - ("overrides" in more)


@pytest.mark.parametrize("symmetric", [True, False])
def test_we_read_its_folders(symmetric: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """A whole model that the package compresses and transformers saves."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16, local_files_only=True)
    weights = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32)
    groups = {"group_0": QuantizationScheme(targets=["re:.*_proj"], weights=weights)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    originals: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            blocks = module.weight.data.float().unflatten(1, (-1, 32))
            low, high = blocks.amin(dim=2).clamp(max=0), blocks.amax(dim=2).clamp(min=0)
            span = 2 * torch.maximum(-low, high) if symmetric else high - low
            module.weight_scale.data = (span / 15).bfloat16()
            if not symmetric:
                zero = torch.round(-low / (span / 15)) - 8
                module.weight_zero_point.data = zero.clamp(-8, 7).to(torch.int8)
            originals[f"{name}.weight"] = module.weight.data.float().clone()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(str(tmp_path / "theirs"))
    compressor.decompress_model(model)
    artifact = open_artifact(tmp_path / "theirs")
    assert len(originals) == 14 and set(originals) == {name for name in artifact.names() if artifact.quantized(name)}
    for name, original in originals.items():
        theirs = model.get_submodule(name.removesuffix(".weight")).weight
        ours = artifact.read(name)
        assert theirs.dtype == torch.bfloat16 and torch.equal(ours.bfloat16(), theirs)
        assert 0 < (ours - original).abs().max() < 0.1  # quantized, and near what it was
