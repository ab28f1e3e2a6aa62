"""AutoAWQ and GPTQ files: words equal to those of the readers' own packers, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats import open_artifact
from quantkit.formats.autoawq import AutoAWQ, pack_awq, unpack_awq
from quantkit.formats.autogptq import AutoGPTQ, pack_gptq, undo_borrows, unpack_gptq
from quantkit.formats.base import LinearPlan
from quantkit.maths.affine import quantize_nearest
from quantkit.methods.gptq import GPTQ
from quantkit.methods.int8 import INT8
from quantkit.methods.rtn import RTN
from quantkit.model.reader import open_source
from quantkit.plan import plan_linears
from quantkit.recipe import Recipe
from quantkit.tensors import Grid, GroupTensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def _cases(name: str) -> dict[str, dict[str, Tensor]]:
    cases: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        case, part = key.split("/")
        cases.setdefault(case, {})[part] = tensor
    return cases


GPTQ_GOLDEN, AWQ_GOLDEN = _cases("gptqmodel"), _cases("autoawq")


def _tensor(case: dict[str, Tensor], name: str, bits: int) -> GroupTensor:
    symmetric = name.split("-")[-1] == "sym" or "-sym" in name
    size = case["codes"].shape[1] // case["scale"].shape[1]
    in_order = torch.arange(case["codes"].shape[1]) // size
    group_of = None if torch.equal(case["g_idx"].long(), in_order) else case["g_idx"]
    return GroupTensor(
        case["codes"], case["scale"], None if symmetric else case["zero"], Grid(bits, size, symmetric), group_of
    )


def _same(found: GroupTensor, wanted: GroupTensor) -> bool:
    zeros = (found.zero is None) == (wanted.zero is None)
    if found.zero is not None and wanted.zero is not None:
        zeros = torch.equal(found.zero, wanted.zero)
    codes = torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)
    return codes and zeros and torch.equal(found.column_groups(), wanted.column_groups())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("name", list(GPTQ_GOLDEN))
def test_gptq_words_are_those_of_gptqmodel(name: str, version: str) -> None:
    case, bits = GPTQ_GOLDEN[name], int(name[0])
    tensor = _tensor(case, name, bits)
    packed = pack_gptq("m.weight", tensor, version)
    assert torch.equal(packed["m.qweight"], case["qweight"])
    theirs = case["qzeros_v1" if version == "gptq" else "qzeros_v2"]
    borrowed = version == "gptq" and bits != 3 and bool((case["zero"] == 0).any())
    assert torch.equal(packed["m.qzeros"], theirs) is not borrowed
    assert torch.equal(packed["m.scales"], case["scales"])
    assert torch.equal(packed["m.g_idx"], case["g_idx"])
    size = tensor.grid.group_size
    parts = [packed[f"m.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    assert _same(unpack_gptq(*parts, bits, size, tensor.grid.symmetric, version), tensor)


def test_symmetric_four_bit_zeros_are_the_word_that_readers_expect() -> None:
    tensor = quantize_nearest(torch.randn(32, 32), Grid(4, 16, True))
    assert set(pack_gptq("m.weight", tensor, "gptq")["m.qzeros"].flatten().tolist()) == {0x77777777}
    assert set(pack_gptq("m.weight", tensor, "gptq_v2")["m.qzeros"].flatten().tolist()) == {0x88888888 - 2**32}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_of_zero_does_not_borrow_from_its_neighbours(bits: int) -> None:
    weight = torch.rand(32, 32)  # all positive: every zero is 0
    weight[5] = -weight[5]  # but for one row, whose zero is the top of the grid
    tensor = quantize_nearest(weight, Grid(bits, 16, False))
    assert tensor.zero is not None and (tensor.zero == 0).any() and (tensor.zero[5] > 0).all()
    packed = pack_gptq("m.weight", tensor, "gptq")
    parts = [packed[f"m.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    assert _same(unpack_gptq(*parts, bits, 16, False, "gptq"), tensor)


@pytest.mark.parametrize("name", [name for name in GPTQ_GOLDEN if not name.startswith("3")])
def test_borrowed_zeros_of_gptqmodel_are_given_back(name: str) -> None:
    case, bits = GPTQ_GOLDEN[name], int(name[0])
    assert torch.equal(undo_borrows(case["qzeros_v1"], bits), case["qzeros_v2"])


def _read_from_folder(folder: Path, bits: int, words: dict[str, Tensor], **settings: object) -> GroupTensor:
    """One linear of another tool, in a folder with these settings, read back."""
    folder.mkdir()
    save_file({f"m.{part}": tensor for part, tensor in words.items()}, folder / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 16, "sym": False, **settings}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    found = open_artifact(folder).quantized("m.weight")
    assert isinstance(found, GroupTensor)
    return found


@pytest.mark.parametrize("name", [name for name in GPTQ_GOLDEN if name.endswith("zeros0")])
def test_files_of_gptqmodel_are_read_as_it_wrote_them(name: str, tmp_path: Path) -> None:
    case, bits = GPTQ_GOLDEN[name], int(name[0])
    wanted, meta = _tensor(case, name, bits), {"quantizer": ["optimum:2.3.0", "gptqmodel:7.6.0"]}
    words = {part: case[part] for part in ("qweight", "scales")}
    v1 = {**words, "qzeros": case["qzeros_v1"], "g_idx": case["g_idx"]}
    assert _same(_read_from_folder(tmp_path / "v1", bits, v1, checkpoint_format="gptq", meta=meta), wanted)
    # newer tools name the key `format`; some leave g_idx out where columns lie in order
    v2 = {**words, "qzeros": case["qzeros_v2"]}
    assert _same(_read_from_folder(tmp_path / "v2", bits, v2, format="gptq_v2", meta=meta), wanted)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    case = GPTQ_GOLDEN["4-asym"]
    words = {part: case[part] for part in ("qweight", "scales")} | {"qzeros": case["qzeros_v1"]}
    with pytest.raises(ModelError, match="checkpoint_format marlin; expected gptq or gptq_v2"):
        _read_from_folder(tmp_path / "m", 4, words, checkpoint_format="marlin")


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_our_own_folder_with_zeros_of_zero_reads_back(
    tiny_llama: Path, tmp_path: Path, bits: int, version: str
) -> None:
    recipe = Recipe.model_validate(
        {
            "method": {"name": "rtn", "bits": bits, "group_size": 32},
            "format": {"name": "autogptq", "checkpoint_format": version},
        }
    )
    made = _written(tiny_llama, tmp_path / "out", recipe, one_signed=True)
    assert all(tensor.zero is not None and (tensor.zero == 0).any() for tensor in made.values())
    artifact = open_artifact(tmp_path / "out")
    for name, tensor in made.items():
        found = artifact.quantized(name)
        assert isinstance(found, GroupTensor) and _same(found, tensor)


@pytest.mark.parametrize("name", list(AWQ_GOLDEN))
def test_awq_words_are_those_of_autoawq(name: str) -> None:
    case = AWQ_GOLDEN[name]
    tensor = _tensor(case, name, 4)
    packed = pack_awq("m.weight", tensor)
    for part in ("qweight", "qzeros", "scales"):
        assert torch.equal(packed[f"m.{part}"], case[part]), part
    size = tensor.grid.group_size
    parts = [packed[f"m.{part}"] for part in ("qweight", "qzeros", "scales")]
    assert _same(unpack_awq(*parts, size, not tensor.grid.symmetric), tensor)


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    tensor = quantize_nearest(torch.randn(8, 32), Grid(4, 16, True), torch.float32)
    with pytest.raises(ModelError, match="float16"):
        pack_gptq("m.weight", tensor, "gptq")


def _written(model: Path, out: Path, recipe: Recipe, one_signed: bool = False) -> dict[str, GroupTensor]:
    """An artifact made by hand: every planned linear rounded to nearest. Returns what went in.

    one_signed: every third row is made positive, so that its zeros are 0.
    """
    source = open_source(str(model))
    plans = plan_linears(recipe, source)
    assert recipe.resolved_format.misfits(plans, source) == []
    out.mkdir()
    writer = recipe.resolved_format.writer(out, source, plans, torch.float16)
    methods = {f"{plan.name}.weight": plan.method for plan in plans if plan.method is not None}
    made = {}
    for name in source.names():
        tensor = source.read(name)
        if name in methods:
            if one_signed:
                tensor = tensor.clone()
                tensor[::3] = tensor[::3].abs()
            made[name] = quantize_nearest(tensor, methods[name].grid)
        writer.add(name, made.get(name, tensor))
    writer.finish()
    return made


def test_a_gptq_folder_reads_back_with_overrides(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "method": {"name": "gptq", "bits": 4, "group_size": 32},
            "overrides": {"down_proj": {"bits": 8, "group_size": 64}, r"layers\.1.*v_proj": "skip"},
        }
    )
    made = _written(tiny_llama, tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["bits"] == 4 and config["group_size"] == 32 and config["sym"] is True
    # what transformers reads in place of `dynamic`
    (quantized,) = config["modules_in_block_to_quantize"]
    assert sorted(quantized) == sorted(name.removesuffix(".weight") for name in made)
    assert config["dynamic"]["-:^model\\.layers\\.1\\.self_attn\\.v_proj$"] == {}
    assert config["dynamic"]["+:^model\\.layers\\.0\\.mlp\\.down_proj$"] == {"bits": 8, "group_size": 64, "sym": True}
    artifact = open_artifact(tmp_path / "out")
    assert artifact.format_name == "autogptq"
    for name, tensor in made.items():
        found = artifact.quantized(name)
        assert isinstance(found, GroupTensor) and _same(found, tensor)
        assert torch.equal(artifact.read(name), tensor.dequantize())
        assert artifact.shape(name) == tuple(tensor.shape)
    assert artifact.quantized("model.layers.1.self_attn.v_proj.weight") is None
    assert len(made) == 13


def test_an_awq_folder_reads_back(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"method": {"name": "awq", "group_size": 32}, "overrides": {"layers.1.*v_proj": "skip"}}
    )
    made = _written(tiny_llama, tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["version"] == "gemm" and config["zero_point"] is True and config["group_size"] == 32
    assert config["modules_to_not_convert"] == ["model.layers.1.self_attn.v_proj", "lm_head"]
    artifact = open_artifact(tmp_path / "out")
    for name, tensor in made.items():
        found = artifact.quantized(name)
        assert isinstance(found, GroupTensor) and _same(found, tensor)
        assert artifact.shape(name) == tuple(tensor.shape)


def test_misfits_name_every_layer(tiny_llama: Path) -> None:
    source = open_source(str(tiny_llama))
    odd = [LinearPlan("a", 12, 64, RTN(group_size=32)), LinearPlan("b", 64, 64, GPTQ(bits=8, group_size=32))]
    problems = AutoAWQ().misfits([*odd, LinearPlan("c", 64, 64, INT8())], source)
    text = "\n".join(problems)
    assert "a: out_features 12" in text and "b: the autoawq format holds 4 bits, found 8" in text and "c: int8" in text
    assert "one group size and one kind of zero" in text
    problems = AutoAWQ().misfits([LinearPlan("lm_head", 384, 64, RTN(group_size=32))], source)
    assert len(problems) == 1 and problems[0].startswith("lm_head: readers of autoawq files keep it unquantized")
    problems = AutoGPTQ().misfits([LinearPlan("d", 33, 64, RTN(bits=3, group_size=32))], source)
    assert len(problems) == 1 and "out_features 33" in problems[0]


def test_asymmetric_files_store_zeros_as_they_are_unless_told_otherwise(tiny_llama: Path, tmp_path: Path) -> None:
    def version(out: str, symmetric: bool, **form: str) -> str:
        method = {"name": "rtn", "group_size": 32, "symmetric": symmetric}
        recipe = Recipe.model_validate({"method": method, "format": {"name": "autogptq", **form}})
        _written(tiny_llama, tmp_path / out, recipe)
        config = json.loads((tmp_path / out / "config.json").read_text())
        return str(config["quantization_config"]["checkpoint_format"])

    assert version("symmetric", True) == "gptq"
    assert version("asymmetric", False) == "gptq_v2"
    assert version("told", False, checkpoint_format="gptq") == "gptq"
