"""compressed-tensors files: words of the package's own packer, folders of every method read back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.errors import ModelError, RecipeError
from quantkit.formats import open_artifact
from quantkit.formats.base import LinearPlan
from quantkit.formats.compressed_schemes import Scheme, read_schemes
from quantkit.formats.compressed_tensors import CompressedTensors, CompressedTensorsArtifact, pack_weight, unpack_weight
from quantkit.inspection import inspect
from quantkit.jobs import quantize
from quantkit.maths.affine import quantize_nearest
from quantkit.methods.int8 import INT8
from quantkit.methods.nf4 import NF4
from quantkit.methods.rtn import RTN
from quantkit.model.reader import open_source
from quantkit.progress import Progress
from quantkit.tensors import Grid, GroupTensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "compressed_tensors.safetensors"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def _cases() -> dict[str, dict[str, Tensor]]:
    cases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN).items():
        case, part = key.split("/")
        cases.setdefault(case, {})[part] = tensor
    return cases


CASES = _cases()


def _tensor(name: str) -> GroupTensor:
    case = CASES[name]
    columns, groups = case["codes"].shape[1], case["scale"].shape[1]
    grid = Grid(int(name[0]), None if name.endswith("channel") else columns // groups, "-sym" in name)
    group_of = case["g_idx"] if name.endswith("actorder") else None
    return GroupTensor(case["codes"], case["scale"], None if grid.symmetric else case["zero"], grid, group_of)


def _same(found: Any, wanted: GroupTensor) -> bool:
    """Every field equal, not only the weights."""
    assert isinstance(found, GroupTensor)
    for ours, theirs in ((found.zero, wanted.zero), (found.group_of, wanted.group_of)):
        if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(ours, theirs)):
            return False
    equal = torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)
    return equal and found.grid == wanted.grid


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("actorder")])
def test_words_are_those_of_the_package(name: str) -> None:
    case = CASES[name]
    packed = pack_weight("m.weight", _tensor(name))
    stored = {f"m.{part}": tensor for part, tensor in case.items() if part.startswith("weight_")}
    assert packed.keys() == stored.keys()
    for part, words in packed.items():
        assert words.dtype == stored[part].dtype and torch.equal(words, stored[part]), part


@pytest.mark.parametrize("name", list(CASES))
def test_words_of_the_package_are_read(name: str) -> None:
    tensor = _tensor(name)
    if name.endswith("actorder"):
        assert tensor.group_of is not None and not torch.equal(tensor.group_of, tensor.group_of.sort().values)
    assert _same(unpack_weight("m", CASES[name], tensor.grid), tensor)


def test_columns_that_were_never_reordered() -> None:
    tensor = _tensor("4-sym")
    for g_idx in (torch.full((96,), -1, dtype=torch.int32), torch.arange(96, dtype=torch.int32) // 32):
        assert _same(unpack_weight("m", {**CASES["4-sym"], "weight_g_idx": g_idx}, tensor.grid), tensor)


def test_columns_out_of_order_are_not_written() -> None:
    with pytest.raises(ModelError, match="m.weight: its groups are not runs of columns.*no weight_g_idx any more"):
        pack_weight("m.weight", _tensor("4-sym-actorder"))


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(ModelError, match="float16"):
        pack_weight("m.weight", quantize_nearest(torch.randn(8, 32), Grid(4, 16, True), torch.float32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(1, 1, None), (7, 45, 9), (33, 50, None)])
def test_odd_shapes_of_every_width(
    out_features: int, in_features: int, group_size: int | None, symmetric: bool, bits: int
) -> None:
    generator = torch.Generator().manual_seed(bits)
    grid = Grid(bits, group_size, symmetric)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    size = (out_features, grid.groups(in_features))
    zero = torch.randint(0, 2**bits, size, generator=generator, dtype=torch.uint8)
    tensor = GroupTensor(codes, torch.rand(size, generator=generator).half().float(), None if symmetric else zero, grid)
    parts = {name.removeprefix("m."): part for name, part in pack_weight("m.weight", tensor).items()}
    assert ("weight_zero_point" in parts) is not symmetric
    assert _same(unpack_weight("m", parts, grid), tensor)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("weight_shape", torch.tensor([33]), r"weight_shape: found \[33\]"),
        ("weight_shape", torch.tensor([33, 128]), r"weight_packed: shape \[33, 12\], expected \[33, 16\]"),
        ("weight_scale", torch.ones(33, 2), r"weight_scale: shape \[33, 2\], expected \[33, 3\] for a 4-bit g32 asym"),
        ("weight_zero_point", torch.zeros(33, 3, dtype=torch.int32), r"weight_zero_point: .*expected \[5, 3\]"),
        ("weight_g_idx", torch.zeros(5, dtype=torch.int32), r"weight_g_idx: shape \[5\], expected \[96\]"),
        ("weight_g_idx", torch.full((96,), 3, dtype=torch.int32), "weight_g_idx: a group outside 0 to 2"),
    ],
)
def test_parts_that_do_not_fit_are_named(part: str, changed: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=f"x: m.{message}"):
        unpack_weight("x: m", {**CASES["4-asym"], part: changed}, Grid(4, 32, False))


def _make(model: Path, out: Path, recipe: dict[str, Any]) -> CompressedTensorsArtifact:
    """An artifact through the whole pipeline."""
    path = out.with_suffix(".yaml")
    calibration = {"sequences": 4, "length": 64}
    path.write_text(json.dumps({**recipe, "format": {"name": "compressed-tensors"}, "calibration": calibration}))
    quantize(
        str(path), model=str(model), out=out, settings=[], device="cpu", force=False, progress=Progress(quiet=True)
    )
    artifact = open_artifact(out)
    assert isinstance(artifact, CompressedTensorsArtifact) and artifact.format_name == "compressed-tensors"
    return artifact


def _config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ({"name": "gptq", "bits": 4, "group_size": 32}, "static"),
        ({"name": "gptq", "bits": 3, "group_size": 32, "act_order": False}, None),
        ({"name": "awq", "group_size": 32}, "static"),
        ({"name": "awq", "group_size": 32, "rounding": "nearest"}, None),
        ({"name": "rtn", "bits": 8, "group_size": None, "symmetric": True}, None),
    ],
)
def test_every_method_makes_the_weights_that_it_makes_for_gptq_files(
    method: dict[str, Any], order: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    artifact = _make(tiny_llama, tmp_path / "ct", {"method": method})
    (group,) = _config(tmp_path / "ct")["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["weights"]["actorder"] == order
    assert group["weights"]["strategy"] == ("group" if method["group_size"] else "channel")
    recipe = {"method": method, "format": {"name": "autogptq"}, "calibration": {"sequences": 4, "length": 64}}
    (tmp_path / "gptq.yaml").write_text(json.dumps(recipe))
    quantize(
        str(tmp_path / "gptq.yaml"),
        model=str(tiny_llama),
        out=tmp_path / "gptq",
        settings=[],
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
    )
    other = open_artifact(tmp_path / "gptq")
    assert set(artifact.names()) == set(other.names())
    for name in artifact.names():
        assert artifact.is_quantized(name) == (other.quantized(name) is not None)
        assert torch.equal(artifact.read(name), other.read(name)) and artifact.shape(name) == other.shape(name)


def test_several_grids_are_told_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {
        "method": {"name": "rtn", "bits": 4, "group_size": 32},
        "overrides": {"down_proj": {"bits": 8, "group_size": None, "symmetric": True}, r"layers\.1.*v_proj": "skip"},
    }
    artifact = _make(tiny_llama, tmp_path / "out", recipe)
    config = _config(tmp_path / "out")
    assert config["ignore"] == ["model.layers.1.self_attn.v_proj", "lm_head"]
    first, second = config["config_groups"].values()
    assert second["targets"] == [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]
    assert len(first["targets"]) == 2 * 6 - 1 and not set(first["targets"]) & {*second["targets"], *config["ignore"]}
    source = open_source(str(tiny_llama))
    for name in artifact.names():
        module = name.removesuffix(".weight")
        if module in second["targets"]:
            wanted = quantize_nearest(source.read(name), Grid(8, None, True))
        elif module in first["targets"]:
            wanted = quantize_nearest(source.read(name), Grid(4, 32, False))
        else:
            assert artifact.quantized(name) is None
            continue
        assert _same(artifact.quantized(name), wanted)
    assert inspect(tmp_path / "out")["format"] == "compressed-tensors"
    (tmp_path / "out" / "quantkit.json").unlink()
    assert inspect(tmp_path / "out")["method"] == "compressed-tensors 4-bit g32 asym + 8-bit row sym"


def test_a_tied_head_is_ignored_and_a_quantized_one_is_not(
    tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"method": {"name": "rtn", "group_size": 32}}
    _make(tiny_llama_tied, tmp_path / "tied", recipe)
    assert _config(tmp_path / "tied")["ignore"] == ["lm_head"]
    artifact = _make(tiny_llama, tmp_path / "head", {**recipe, "skip": []})
    assert _config(tmp_path / "head")["ignore"] == [] and artifact.is_quantized("lm_head.weight")


def test_bfloat16_would_round_the_scales(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="model.dtype: bfloat16"):
        _make(
            tiny_llama, tmp_path / "out", {"method": {"name": "rtn", "group_size": 32}, "model": {"dtype": "bfloat16"}}
        )
    assert not (tmp_path / "out").exists()
    artifact = _make(
        tiny_llama, tmp_path / "f32", {"method": {"name": "rtn", "group_size": 32}, "model": {"dtype": "float32"}}
    )
    assert artifact.entry("model.layers.0.mlp.up_proj.weight_scale").dtype == "F16"
    assert artifact.dtype("model.norm.weight") == torch.float32


def test_misfits_name_every_layer(tiny_llama: Path) -> None:
    source = open_source(str(tiny_llama))
    plans = [LinearPlan("a", 64, 64, INT8()), LinearPlan("b", 64, 64, NF4()), LinearPlan("c", 7, 45, RTN(group_size=9))]
    problems = CompressedTensors().misfits([*plans, LinearPlan("d", 64, 64, None)], source)
    assert [problem.split(" does not")[0] for problem in problems] == ["a: int8", "b: nf4"]


def _folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """One linear of another tool, in a folder."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **config}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return folder


@pytest.mark.parametrize("name", ["4-sym", "4-sym-actorder"])
def test_a_folder_of_another_tool(name: str, tmp_path: Path) -> None:
    stored = {f"m.{part}": tensor for part, tensor in CASES[name].items() if part.startswith("weight_")}
    folder = _folder(tmp_path / "m", {**stored, "norm.weight": torch.ones(4, dtype=torch.bfloat16)})
    artifact = open_artifact(folder)
    assert artifact.names() == ["m.weight", "norm.weight"] and artifact.shape("m.weight") == (40, 96)
    assert _same(artifact.quantized("m.weight"), _tensor(name))
    assert artifact.stored_bytes("m.weight") == sum(tensor.nbytes for tensor in stored.values())
    assert inspect_label(folder) == "compressed-tensors 4-bit g32 sym"


def inspect_label(folder: Path) -> str:
    from quantkit.inspection import method_label

    return str(method_label(_config(folder)))


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    stored = {f"m.{name}": tensor for name, tensor in CASES["4-asym"].items() if name.startswith("weight_")}
    del stored[f"m.{part}"]
    groups = {"group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, "symmetric": False}}}
    artifact = open_artifact(_folder(tmp_path / "m", stored, config_groups=groups))
    with pytest.raises(ModelError, match=f"no tensor m.{part}|m.{part}: missing"):
        artifact.read("m.weight")


def test_a_linear_that_no_group_targets_is_named(tmp_path: Path) -> None:
    stored = {f"m.{name}": tensor for name, tensor in CASES["4-sym"].items() if name.startswith("weight_")}
    groups = {"group_0": {"targets": ["re:.*up_proj", "Embedding"], "weights": WEIGHTS}}
    artifact = open_artifact(_folder(tmp_path / "m", stored, config_groups=groups))
    with pytest.raises(ModelError, match="m: packed, but no config group targets it"):
        artifact.read("m.weight")


def test_all_that_is_not_read_is_listed_at_once() -> None:
    group = {"targets": ["Linear"], "weights": WEIGHTS}
    groups = {
        "a": {**group, "format": "nvfp4-pack-quantized", "input_activations": {"num_bits": 8}},
        "b": {**group, "weights": {**WEIGHTS, "num_bits": 9, "strategy": "block", "symmetric": None}},
        "c": {**group, "weights": {**WEIGHTS, "group_size": 0, "type": "float"}, "targets": ["re:("]},
        "d": ["Linear"],
        "e": {**group, "output_activations": {"num_bits": 8}, "weights": {"num_bits": 4, "type": "int"}},
    }
    quantization = {"format": "pack-quantized", "config_groups": groups, "transform_config": {"r": 1}}
    with pytest.raises(ModelError) as caught:
        read_schemes("config.json", {**quantization, "kv_cache_scheme": {"num_bits": 8}})
    lines = [line.removeprefix("config.json: quantization_config: ") for line in caught.value.message.splitlines()]
    only = "is set, expected none: only quantized weights are read"
    assert lines == [
        f"kv_cache_scheme {only}",
        f"transform_config {only}",
        "config_groups.a: format nvfp4-pack-quantized, expected pack-quantized",
        f"config_groups.a: input_activations {only}",
        "config_groups.b: weights of type int with 9 bits, expected int with 1 to 8",
        "config_groups.b: symmetric None, expected true or false",
        "config_groups.b: strategy block, expected group or channel",
        "config_groups.c: targets: found ['re:('], expected a list of names and valid regexes",
        "config_groups.c: weights of type float with 4 bits, expected int with 1 to 8",
        "config_groups.c: group_size 0, expected a positive number",
        "config_groups.d: found ['Linear'], expected targets and weights",
        f"config_groups.e: output_activations {only}",
        "config_groups.e: symmetric None, expected true or false",
        "config_groups.e: strategy tensor, expected group or channel",
    ]
    with pytest.raises(ModelError, match="config_groups: found None, expected at least one"):
        read_schemes("config.json", {"format": "pack-quantized"})


def test_the_closest_target_counts() -> None:
    grid = Grid(4, 32, True)
    by_name, by_regex, by_class = (
        Scheme(targets, grid) for targets in (("a.up_proj",), ("re:.*up", "re:.*proj"), ("Linear",))
    )
    assert (by_name.rank("a.up_proj"), by_name.rank("b.up_proj")) == ((0, "a.up_proj"), None)
    assert by_regex.rank("a.up_proj") == (1, "re:.*proj")  # as the package sorts them
    assert by_class.rank("anything") == (2, "Linear")
