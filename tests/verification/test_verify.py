"""Verification: whole artifacts pass, any flipped bit is found, and what cannot be checked is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import ModelError, VerificationError
from quantkit.jobs import quantize
from quantkit.manifest import MANIFEST_NAME, read_manifest
from quantkit.progress import Progress
from quantkit.verification import verify

SMALL = ["calibration.sequences=4", "calibration.length=64"]
MADE = {
    "gptq": ("gptq-4bit-g64", ["method.group_size=32"]),
    "awq": ("awq-4bit-g64", ["method.group_size=32", "method.exponents=4"]),
    "packed": ("gptq-w4a16", ["method.group_size=32", "method.symmetric=false"]),
    "int8": ("int8", []),
    "nf4": ("nf4-double", []),
    "gguf": ("gguf-q4_0", []),
    "imatrix": ("gguf-iq4_nl", ["method.importance=true", "method.embedding_type=q8_0"]),
}
CALIBRATED = ("gptq", "awq", "packed", "imatrix")


@pytest.fixture(scope="session")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for name, (recipe, settings) in MADE.items():
        quantize(
            recipe,
            model=str(tiny_llama),
            out=folder / name,
            settings=[*SMALL, *settings],
            device="cpu",
            force=False,
            progress=Progress(quiet=True),
        )
    return folder


@pytest.fixture
def copied(artifacts: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(artifacts / name, tmp_path / name))

    return copy


@pytest.mark.parametrize("name", MADE)
def test_a_whole_artifact_passes_down_to_blocks_made_again(artifacts: Path, tiny_llama: Path, name: str) -> None:
    report = verify(artifacts / name, source=str(tiny_llama), deep=True)
    assert report.findings == [] and report.exit_code == 0
    manifest = read_manifest(artifacts / name)
    assert manifest is not None
    assert report.checked["files"] == len(manifest.files) + 1, "the manifest itself included"
    assert report.checked["tensors made again"] == report.checked["tensors"]
    assert report.skipped == [], "two blocks are the whole model"


@pytest.mark.parametrize("name", MADE)
def test_a_flipped_bit_is_found_wherever_it_is(copied: Callable[[str], Path], name: str) -> None:
    folder, random = copied(name), Random(name)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        weights = path.suffix in (".safetensors", ".gguf")
        for _ in range(6 if weights or path.name == MANIFEST_NAME else 1):
            at, bit = random.randrange(len(data)), random.randrange(8)
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            report = verify(folder)
            assert not report.passed, f"{path.name}: byte {at}, bit {bit}"
            assert any(path.name in line for line in report.findings), report.findings
        path.write_bytes(data)
    assert verify(folder).passed


def test_every_bit_of_a_manifest_counts(copied: Callable[[str], Path]) -> None:
    from quantkit.verification.files import check_files
    from quantkit.verification.report import Report

    folder, random = copied("gguf"), Random(0)
    file = folder / MANIFEST_NAME
    data = file.read_bytes()
    for at in random.sample(range(len(data)), 150):
        changed = bytearray(data)
        changed[at] ^= 1 << random.randrange(8)
        file.write_bytes(changed)
        report = Report("x")
        check_files(next(folder.glob("*.gguf")), report)
        assert report.findings, f"byte {at}: {data[max(0, at - 20) : at + 20]!r}"


def test_files_that_are_missing_or_added(copied: Callable[[str], Path]) -> None:
    folder = copied("gptq")
    (folder / "tokenizer.json").unlink()
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"x")
    (folder / "tokenization_own.py").write_text("")
    (folder / "my notes.txt").write_text("x")
    report = verify(folder)
    found = "\n".join(report.findings)
    assert "tokenizer.json: cannot be read" in found
    assert (
        "model-00002-of-00002.safetensors: found a file that engines read" in found and "tokenization_own.py" in found
    )
    assert report.notes == ["my notes.txt: not part of the artifact"]
    with pytest.raises(VerificationError):
        report.require()


def without_manifest(folder: Path) -> Path:
    (folder / MANIFEST_NAME).unlink()
    return folder


def change(folder: Path, name: str, changed: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    value = changed(tensors.pop(name))
    if value is not None:
        tensors[name] = value.contiguous()
    save_file(tensors, path)


def with_value(position: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[position] = value
        return tensor

    return changed


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "changed", "line"),
    [
        ("gptq", f"{Q}.scales", with_value(0, float("nan")), f"{Q}.scales: found nan, expected finite values"),
        ("gptq", f"{Q}.g_idx", with_value(3, 9), f"{Q}.g_idx: found groups from 0 to 9, expected 0 to 1"),
        ("gptq", f"{Q}.qzeros", lambda t: t[:1], f"{Q}.qzeros: found I32 [1, 8], expected I32 [2, 8]"),
        (
            "gptq",
            f"{Q}.scales",
            lambda t: t.int(),
            f"{Q}.scales: found I32 [2, 64], expected F16 or BF16 or F32 [2, 64]",
        ),
        ("gptq", f"{Q}.scales", lambda t: None, f"{Q}.scales: missing, expected F16 [2, 64]"),
        ("gptq", f"{Q}.qweight", lambda t: t[:, :32], f"{Q}.weight: found [32, 64], expected [64, 64] by config.json"),
        ("gptq", "model.norm.weight", lambda t: None, "model.norm.weight: missing, expected [64]"),
        ("gptq", "model.norm.weight", lambda t: t.int(), "model.norm.weight: found I32, expected F16 or BF16 or F32"),
        ("awq", f"{Q}.scales", with_value(0, float("inf")), f"{Q}.scales: found inf, expected finite values"),
        ("awq", f"{Q}.qzeros", lambda t: t.T, f"{Q}.qzeros: found I32 [8, 2], expected I32 [2, 8]"),
        ("packed", f"{Q}.weight_scale", with_value(0, float("nan")), f"{Q}.weight_scale: found nan"),
        ("packed", f"{Q}.weight_zero_point", lambda t: None, f"{Q}.weight_zero_point: missing"),
        ("int8", f"{Q}.SCB", with_value(0, -1.0), f"{Q}.SCB: found -1, expected finite values from 0"),
        ("int8", f"{Q}.weight", with_value(0, -128), f"{Q}.weight: found -128, expected codes from -127 to 127"),
        ("nf4", f"{Q}.weight.quant_map", with_value(0, -0.9), f"{Q}.weight.quant_map: found [-0.8"),
        ("nf4", f"{Q}.weight.absmax", lambda t: t[1:], f"{Q}.weight.absmax: found U8 [63], expected U8 [64]"),
        ("nf4", f"{Q}.weight.nested_absmax", with_value(0, float("nan")), f"{Q}.weight.nested_absmax: found nan"),
    ],
)
def test_the_format_is_checked_without_a_manifest(
    copied: Callable[[str], Path],
    name: str,
    tensor: str,
    changed: Callable[[torch.Tensor], torch.Tensor | None],
    line: str,
) -> None:
    folder = without_manifest(copied(name))
    whole = verify(folder)
    assert whole.passed and any("no quantkit.json" in text for text in whole.skipped)
    change(folder, tensor, changed)
    report = verify(folder)
    assert any(found.startswith(line) for found in report.findings), report.findings


def test_stray_tensors_and_padding(copied: Callable[[str], Path]) -> None:
    folder = without_manifest(copied("gptq"))
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.layers.7.extra": torch.zeros(1)}, path)
    assert "model.layers.7.extra: stray tensor, expected none of this name in the model" in verify(folder).findings


def test_a_gguf_file_alone(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("gguf")
    file = next(folder.glob("*.gguf"))
    alone = Path(shutil.copy(file, tmp_path / "alone.gguf"))
    report = verify(alone)
    assert report.passed and any("no quantkit.json" in line for line in report.skipped)
    assert verify(file).passed and verify(file).checked["files"] == 2, "its manifest lies beside it"
    alone.write_bytes(file.read_bytes() + b"\x01")
    assert any("behind the last tensor" in line for line in verify(alone).findings)


def test_lineage_names_the_file_that_differs(artifacts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    report = verify(artifacts / "gptq", source=str(other), deep=True)
    assert len(report.findings) == 1 and "model.safetensors: found sha256" in report.findings[0]
    assert any("made again" in line for line in report.skipped)


@pytest.mark.parametrize("name", ["gptq", "nf4", "gguf"])
def test_deep_finds_other_codes_under_a_matching_manifest(
    copied: Callable[[str], Path], tiny_llama: Path, name: str
) -> None:
    """Whoever changes weights can change the manifest, too; only making them again tells."""
    from quantkit.manifest import file_record, write_manifest

    folder = copied(name)
    manifest = read_manifest(folder)
    assert manifest is not None
    weights = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    if name == "gguf":
        from quantkit.model.gguf_file import GGUFFile

        place = GGUFFile(weights).tensors["blk.0.attn_q.weight"].start + 5
    else:
        from quantkit.model.safetensors_file import ALL_DTYPES, SafetensorsFile

        ending = "qweight" if name == "gptq" else "weight"
        place = SafetensorsFile(weights, ALL_DTYPES).entries[f"{Q}.{ending}"].start
    data = bytearray(weights.read_bytes())
    data[place] ^= 1
    weights.write_bytes(data)
    files = [file_record(folder / record.name, folder) for record in manifest.files]
    write_manifest(manifest.model_copy(update={"files": files}), folder)
    assert verify(folder, source=str(tiny_llama)).passed
    report = verify(folder, source=str(tiny_llama), deep=True)
    assert len(report.findings) == 1 and "found other bytes than the ones made again" in report.findings[0]


def test_a_manifest_of_the_first_schema_is_read_and_what_it_lacks_is_said(copied: Callable[[str], Path]) -> None:
    folder = copied("int8")
    content = json.loads((folder / MANIFEST_NAME).read_text())
    del content["manifest_sha256"]
    (folder / MANIFEST_NAME).write_text(json.dumps(content | {"schema_version": 1}))
    report = verify(folder)
    assert report.passed and any("schema version 1 has no hash" in line for line in report.skipped)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    assert any("manifest_sha256" in line for line in verify(folder).findings)


def test_a_manifest_cannot_name_files_elsewhere(copied: Callable[[str], Path]) -> None:
    folder = copied("int8")
    content = json.loads((folder / MANIFEST_NAME).read_text())
    content["files"][0]["name"] = "../secret"
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    assert any("expected names inside the folder" in line for line in verify(folder).findings)


def test_what_is_no_artifact(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="no such artifact"):
        verify(tmp_path / "nothing")
    with pytest.raises(ModelError, match="not a quantized artifact"):
        verify(tiny_llama)


def test_the_verb(copied: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    from quantkit.cli import execute

    folder = copied("int8")
    assert execute(["verify", str(folder)]) == 0
    assert "int8: passed; checked" in capfd.readouterr().out
    (folder / "generation_config.json").write_text("{}")
    assert execute(["verify", str(folder), "--json"]) == 6
    document = json.loads(capfd.readouterr().out)
    assert document["passed"] is False and "generation_config.json" in document["findings"][0]
    assert execute(["verify", str(folder), "--deep"]) == 2
