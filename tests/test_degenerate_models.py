"""Models and texts at the edge, end to end: a finite artifact whose manifest tells what happened, or an error that
names the tensor or the block, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fakes.runs import quietly
from quantkit import words
from quantkit.errors import ModelError
from quantkit.formats import open_artifact
from quantkit.manifest import Manifest, read_manifest

CALIBRATED = ["awq-4bit-g64", "awq-4bit-g64-nearest", "gptq-4bit-g64", "gptq-4bit-g64-plain"]
FIRST, SECOND = "model.layers.0", "model.layers.1"
EMBEDDING = "model.embed_tokens.weight"


def make(recipe: str, model: Path, out: Path, *settings: str) -> Manifest:
    small = ["calibration.sequences=4", "calibration.length=64"] if recipe in CALIBRATED else []
    return quietly(recipe, model, out, [*small, *settings])


def changed(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def finite_artifact(out: Path) -> Mapping[str, str]:
    """Checks every tensor of an artifact. Returns what was applied to each linear."""
    artifact = open_artifact(out)
    for name in artifact.names():
        assert bool(torch.isfinite(artifact.read(name).float()).all()), name
    manifest = read_manifest(out)
    assert manifest is not None
    return {record.name: record.applied for record in manifest.tensors}


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_channels_that_no_token_uses(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    def unused(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING][:, [3, 40]] = 0

    manifest = make(recipe, changed(tiny_llama, tmp_path / "model", unused), tmp_path / "out")
    applied = finite_artifact(tmp_path / "out")
    if "nearest" not in recipe:
        assert "2 dead columns" in applied[f"{FIRST}.self_attn.q_proj"]
        assert "dead" not in applied[f"{SECOND}.self_attn.q_proj"]
        told = [line for line in manifest.fallbacks() if "2 of 64 columns had no input" in line]
        assert len(told) == 3, "q, k and v, in the table as well"


def finite_artifact_of(recipe: str, model: Path, out: Path, *settings: str) -> Mapping[str, str]:
    make(recipe, model, out, *settings)
    return finite_artifact(out)


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_fewer_tokens_than_columns(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    few = ("calibration.sequences=1", "calibration.length=8")
    assert finite_artifact_of(recipe, tiny_llama, tmp_path / "out", *few)


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_a_channel_ten_thousand_times_the_others(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    def outlier(tensors: dict[str, Tensor]) -> None:
        tensors[f"{FIRST}.input_layernorm.weight"][5] = 1e4
        for name in ("q", "k", "v"):
            tensors[f"{FIRST}.self_attn.{name}_proj.weight"][:, 5] /= 1e4

    assert finite_artifact_of(recipe, changed(tiny_llama, tmp_path / "model", outlier), tmp_path / "out")


def test_no_correction_where_a_few_tokens_are_nearly_all_of_the_inputs(tiny_llama: Path, tmp_path: Path) -> None:
    def outlier(tensors: dict[str, Tensor]) -> None:
        tensors[f"{FIRST}.mlp.up_proj.weight"][5] *= 1e4
        tensors[f"{FIRST}.mlp.gate_proj.weight"][5] *= 1e2

    manifest = make(
        "gptq-4bit-g64", changed(tiny_llama, tmp_path / "model", outlier), tmp_path / "out", "method.correction=0.75"
    )
    finite_artifact(tmp_path / "out")
    assert any(
        f"{FIRST}.mlp.down_proj" in line and "no correction: few tokens, far out" in line
        for line in manifest.fallbacks()
    )


@pytest.mark.parametrize("share", [1e-2, 1e-4])
@pytest.mark.parametrize("recipe", ["gptq-8bit", "rtn-w8a16", "int8"])
def test_scales_that_float16_keeps_few_digits_of_are_told(
    recipe: str, share: float, tiny_llama: Path, tmp_path: Path
) -> None:
    def small(tensors: dict[str, Tensor]) -> None:
        for layer in (FIRST, SECOND):
            tensors[f"{layer}.input_layernorm.weight"] /= share
            tensors[f"{layer}.self_attn.q_proj.weight"] *= share

    settings = [] if recipe == "int8" else ["method.group_size=32"]
    short = [] if "gptq" not in recipe else ["calibration.sequences=4", "calibration.length=64"]
    manifest = make(recipe, changed(tiny_llama, tmp_path / "model", small), tmp_path / "out", *settings, *short)
    told = [line for line in manifest.fallbacks() if "float16 keeps few digits" in line]
    assert ("q_proj" in "".join(told)) == (share == 1e-4 and recipe != "int8")


@pytest.mark.parametrize(
    "recipe", [*CALIBRATED, "rtn-4bit-g128", "int8", "nf4", "nf4-double", "gguf-q8_0", "gguf-q4_0"]
)
def test_rows_and_matrices_of_zeros(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    def zeros(tensors: dict[str, Tensor]) -> None:
        tensors[f"{FIRST}.mlp.up_proj.weight"][[0, 17]] = 0
        tensors[f"{SECOND}.self_attn.o_proj.weight"][:] = 0

    model = changed(tiny_llama, tmp_path / "model", zeros)
    settings = ["method.group_size=64"] if recipe == "rtn-4bit-g128" else []
    finite_artifact_of(recipe, model, tmp_path / "out", *settings)
    artifact = open_artifact(tmp_path / "out")
    assert not bool(artifact.read(f"{SECOND}.self_attn.o_proj.weight").any())
    assert not bool(artifact.read(f"{FIRST}.mlp.up_proj.weight")[[0, 17]].any())


def refused(recipe: str, model: Path, tmp_path: Path, *settings: str) -> str:
    """The message of the error that a run ends with; nothing may be left of its output."""
    with pytest.raises(ModelError) as caught:
        make(recipe, model, tmp_path / "out", *settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    return caught.value.message


@pytest.mark.parametrize("recipe", [*CALIBRATED, "int8", "nf4"])
@pytest.mark.parametrize("norm", ["post_attention_layernorm", "input_layernorm"])
def test_a_norm_that_is_not_finite_is_named(norm: str, recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    def bad(tensors: dict[str, Tensor]) -> None:
        tensors[f"{SECOND}.{norm}.weight"][3] = float("nan")

    model = changed(tiny_llama, tmp_path / "model", bad)
    assert refused(recipe, model, tmp_path).startswith(f"{SECOND}.{norm}.weight: 1 of 64 values")


@pytest.mark.parametrize("recipe", [*CALIBRATED, "int8", "nf4", "gguf-q8_0"])
def test_a_weight_that_is_not_finite_is_named(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    def bad(tensors: dict[str, Tensor]) -> None:
        tensors[f"{SECOND}.mlp.down_proj.weight"][3, 5] = float("nan")

    message = refused(recipe, changed(tiny_llama, tmp_path / "model", bad), tmp_path)
    assert f"{SECOND}.mlp.down_proj.weight: 1 of 8192 values are NaN or infinite" in message


@pytest.mark.parametrize("recipe", ["rtn-4bit-g128", "nf4"])
@pytest.mark.parametrize("name", [EMBEDDING, f"{FIRST}.input_layernorm.weight", "lm_head.weight"])
def test_a_tensor_that_stays_unquantized_and_is_not_finite_is_named(
    name: str, recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    def bad(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[7] = float("nan")

    settings = ["method.group_size=64"] if recipe == "rtn-4bit-g128" else []
    assert name in refused(recipe, changed(tiny_llama, tmp_path / "model", bad), tmp_path, *settings)


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_an_embedding_that_is_not_finite_is_met_in_the_first_block(
    recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    def bad(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING][:, 2] = float("inf")

    message = refused(recipe, changed(tiny_llama, tmp_path / "model", bad), tmp_path, "model.dtype=bfloat16")
    assert FIRST in message or EMBEDDING in message


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_hidden_states_that_overflow_name_the_block_that_meets_them(
    recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Block 0 is finite by its weights and inputs; what it puts out is not."""

    def huge(tensors: dict[str, Tensor]) -> None:
        tensors[f"{FIRST}.mlp.down_proj.weight"][:] = 3e38
        tensors[f"{FIRST}.mlp.up_proj.weight"] *= 1e3

    model = changed(tiny_llama, tmp_path / "model", huge)
    skipped = ["model.dtype=bfloat16", "overrides={'layers.0.mlp.down_proj': skip}"]
    message = refused(recipe, model, tmp_path, *skipped)
    assert f"inputs of {SECOND}." in message


@pytest.mark.parametrize("recipe", ["awq-4bit-g64", "awq-4bit-g64-nearest"])
def test_a_norm_that_a_scale_drives_out_of_float16_is_named(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    def near_the_end(tensors: dict[str, Tensor]) -> None:
        tensors[f"{FIRST}.input_layernorm.weight"][:] = torch.logspace(2, 4.8, 64)
        tensors[f"{FIRST}.input_layernorm.weight"][0] = 6.5e4

    model = changed(tiny_llama, tmp_path / "model", near_the_end)
    try:
        made = make(recipe, model, tmp_path / "out")
    except ModelError as error:
        assert f"{FIRST}.input_layernorm.weight" in error.message and "float16" in error.message
        return
    finite_artifact(tmp_path / "out")
    marks = {record.name: record for record in made.tensors}[f"{FIRST}.self_attn.q_proj"]
    stored = open_artifact(tmp_path / "out").read(f"{FIRST}.input_layernorm.weight").float()
    assert marks.reason or float(stored.max()) <= 65504


def test_a_fall_back_is_in_the_manifest_and_on_the_screen(tiny_llama: Path, tmp_path: Path) -> None:
    made = make("awq-4bit-g64", tiny_llama, tmp_path / "out", "overrides={'up_proj': skip}")
    lines = made.fallbacks()
    assert len(lines) == 4  # gate and down of both blocks
    assert any(line.startswith(f"{FIRST}.mlp.down_proj: ") and "up_proj is not quantized" in line for line in lines)
    assert "up_proj is not quantized by this method" in words.manifest(made)
    assert read_manifest(tmp_path / "out") == made
