"""inspect: bits per weight from real bytes, with and without a manifest beside the artifact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantkit import words
from quantkit.errors import ModelError
from quantkit.inspection import inspect, method_label
from quantkit.jobs import quantize
from quantkit.progress import Progress

RECIPE = """\
method: {name: rtn, bits: 4, group_size: 32, symmetric: true}
overrides: {down_proj: skip, o_proj: skip}
"""


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "own.yaml").write_text(RECIPE)
    out = folder / "artifact"
    quantize(
        str(folder / "own.yaml"),
        model=str(tiny_llama),
        out=out,
        settings=[],
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
    )
    return out


def test_an_artifact_with_its_manifest(artifact: Path) -> None:
    facts = inspect(artifact)
    assert facts["format"] == "autogptq" and facts["method"] == "rtn 4-bit g32 sym"
    by_name = {tensor["name"]: tensor for tensor in facts["tensors"]}
    up = by_name["model.layers.0.mlp.up_proj.weight"]
    assert up["shape"] == [128, 64] and up["quantized"] and up["applied"] == "rtn 4-bit g32 sym"
    # codes, float16 scales, packed zeros, and a 32-bit g_idx for each of the 64 columns
    assert up["bytes"] == 128 * 64 // 2 + 128 * 2 * 2 + 2 * 128 // 2 + 64 * 4
    skipped = by_name["model.layers.0.self_attn.o_proj.weight"]
    assert not skipped["quantized"] and skipped["bits_per_weight"] == 16 and skipped["requested"] == "skip"
    quantized = [tensor for tensor in facts["tensors"] if tensor["quantized"]]
    assert len(quantized) == 2 * 5
    values = sum(tensor["shape"][0] * tensor["shape"][1] for tensor in quantized)
    assert facts["bits_per_weight"] == pytest.approx(sum(tensor["bytes"] for tensor in quantized) * 8 / values)
    assert 4 < facts["bits_per_weight"] < facts["bits_per_weight_all"] < 16
    assert facts["lineage"]["recipe_sha256"] and "tensors" not in facts["lineage"]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_the_bits_agree_with_the_manifest(artifact: Path) -> None:
    facts = inspect(artifact)
    assert facts["bits_per_weight"] == pytest.approx(facts["lineage"]["bits_per_weight"], rel=1e-9)
    assert facts["bits_per_weight_all"] == pytest.approx(facts["lineage"]["bits_per_weight_all"], rel=1e-9)


def test_an_artifact_by_another_tool_has_no_lineage(artifact: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(artifact, foreign)
    (foreign / "quantkit.json").unlink()
    facts = inspect(foreign)
    assert facts["lineage"] is None
    assert facts["method"] == "gptq 4-bit g32 sym"
    assert facts["bits_per_weight"] == inspect(artifact)["bits_per_weight"]
    text = words.inspection(facts)
    assert "none: no quantkit.json beside it" in text


def test_the_text_joins_tensors_of_one_role(artifact: Path) -> None:
    lines = words.inspection(inspect(artifact)).splitlines()
    row = next(line.split() for line in lines if "model.layers.*.mlp.up_proj.weight" in line)
    assert row[0] == "2" and row[2:5] == ["128", "x", "64"]
    assert any(line.startswith("recipe") and "sha256" in line for line in lines)


def test_what_is_no_artifact(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="no such artifact"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="not a quantized artifact"):
        inspect(tiny_llama)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True},
         "gptq 4-bit g128 sym act-order"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False, "desc_act": False}, "gptq 8-bit row asym"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "awq 4-bit g64 asym"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
          "bnb_4bit_use_double_quant": True}, "bitsandbytes nf4 double"),
        ({"quant_method": "compressed-tensors", "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "group_size": 64, "symmetric": True, "actorder": "static"}},
            "group_1": {"weights": {"num_bits": 8, "group_size": None, "symmetric": False}}}},
         "compressed-tensors 4-bit g64 sym act-order + 8-bit row asym"),
        ({"type": "Q4_1", "types": {"Q4_1": 210}}, "gguf Q4_1"),
        ({}, None),
    ],
)  # fmt: skip
def test_labels_from_the_readers_own_settings(settings: dict[str, object], label: str | None) -> None:
    assert method_label(settings) == label
