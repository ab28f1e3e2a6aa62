"""Blocks made again out of deeper models: any blocks of a plain method, the first ones of a calibrated one."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import write_tiny_llama
from fakes.families import write_family
from fakes.runs import quietly
from quantkit.manifest import Manifest, read_manifest, write_manifest
from quantkit.model.reader import open_source
from quantkit.verification import verify
from quantkit.verification.rederive import SomeBlocks

SMALL = ["calibration.sequences=4", "calibration.length=64"]


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deeper") / "model"
    return write_tiny_llama(folder, num_hidden_layers=5, hidden_size=256, intermediate_size=256, head_dim=64)


def make(recipe: str, model: Path, out: Path, *settings: str) -> Manifest:
    return quietly(recipe, model, out, [*SMALL, *settings])


@pytest.mark.parametrize("recipe", ["nf4-double", "gguf-q4_k_m", "rtn-w8a16"])
def test_any_two_blocks_of_a_plain_method(deeper: Path, tmp_path: Path, recipe: str) -> None:
    """A mix gives a layer its type by its place in the whole model."""
    make(recipe, deeper, tmp_path / "out")
    report = verify(tmp_path / "out", source=str(deeper), deep=True)
    assert report.findings == []
    assert report.checked["tensors made again"] == 2 * 9 + 3
    assert len(report.skipped) == 1 and report.skipped[0].startswith("3 of 5 blocks: only ")


def test_the_first_blocks_of_a_calibrated_method(deeper: Path, tmp_path: Path) -> None:
    make("gptq-4bit-g64", deeper, tmp_path / "out")
    report = verify(tmp_path / "out", source=str(deeper), deep=True)
    assert report.findings == []
    assert report.skipped == [
        "3 of 5 blocks: only 0, 1 were made again; the others follow from these and were not made again"
    ]


def test_a_family_whose_blocks_differ(tiny_llama: Path, tmp_path: Path) -> None:
    model = write_family(tmp_path / "gemma", "gemma3_text", tiny_llama)
    make("gptq-4bit-g64", model, tmp_path / "out", "method.group_size=32")
    report = verify(tmp_path / "out", source=str(model), deep=True)
    assert report.findings == [] and len(report.skipped) == 1


def changed(folder: Path, **changes: object) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    write_manifest(manifest.model_copy(update=changes), folder)


def test_what_cannot_be_made_again_is_said(deeper: Path, tmp_path: Path) -> None:
    manifest = make("gptq-4bit-g64", deeper, tmp_path / "out")
    assert manifest.calibration is not None
    changed(tmp_path / "out", calibration={**manifest.calibration, "fingerprint": "0" * 64})
    report = verify(tmp_path / "out", source=str(deeper), deep=True)
    assert report.passed and any("calibration set has fingerprint" in line for line in report.skipped)
    changed(tmp_path / "out", recipe={**manifest.recipe, "method": {"name": "gone"}}, calibration=manifest.calibration)
    report = verify(tmp_path / "out", source=str(deeper), deep=True)
    assert report.passed and any(line.startswith("blocks made again: ") for line in report.skipped)


def test_a_difference_is_no_finding_where_calibration_was_computed_elsewhere(deeper: Path, tmp_path: Path) -> None:
    manifest = make("gptq-4bit-g64", deeper, tmp_path / "out")
    recipe = {**manifest.recipe, "method": {**manifest.recipe["method"], "damp": 0.5}}
    changed(tmp_path / "out", recipe=recipe)
    assert not verify(tmp_path / "out", source=str(deeper), deep=True).passed
    changed(tmp_path / "out", recipe=recipe, environment={**manifest.environment, "cpu": "another"})
    report = verify(tmp_path / "out", source=str(deeper), deep=True)
    assert report.passed and any("made with cpu another" in line for line in report.skipped)
    assert manifest.calibration is not None
    arithmetic = {**manifest.calibration, "arithmetic": "linears bfloat16, Gram float32"}
    changed(tmp_path / "out", recipe=recipe, environment=manifest.environment, calibration=arithmetic)
    report = verify(tmp_path / "out", source=str(deeper), deep=True)
    assert report.passed and any("made with linears bfloat16, Gram float32" in line for line in report.skipped)
    untold = {key: value for key, value in manifest.calibration.items() if key != "arithmetic"}
    changed(tmp_path / "out", recipe=recipe, environment=manifest.environment, calibration=untold)
    assert not verify(tmp_path / "out", source=str(deeper), deep=True).passed, "what is not stated is no excuse"


def test_blocks_are_numbered_from_zero_and_read_as_they_are(deeper: Path) -> None:
    whole = open_source(str(deeper))
    part = SomeBlocks(whole, [1, 4])
    name = "model.layers.1.mlp.up_proj.weight"
    assert part.config["num_hidden_layers"] == 2 and part.real[name] == "model.layers.4.mlp.up_proj.weight"
    assert part.read(name).equal(whole.read("model.layers.4.mlp.up_proj.weight"))
    assert {name for name in part.names() if "layers" not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
