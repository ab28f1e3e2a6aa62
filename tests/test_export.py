"""export: artifacts of the other formats as GGUF files with the same weights, bit for bit, or a clear no."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_tiny_llama
from fakes.families import write_family
from quantkit import cli, words
from quantkit import export as module
from quantkit.engines.llama_api import VERSION, installed
from quantkit.errors import ModelError, UsageError, VerificationError
from quantkit.export import export
from quantkit.formats import open_artifact
from quantkit.inspection import inspect
from quantkit.jobs import quantize
from quantkit.manifest import Manifest, read_manifest
from quantkit.model.gguf_source import GGUFSource
from quantkit.progress import Progress
from quantkit.tensors import BlockTensor

RTN = "method: {{name: rtn, bits: {bits}, group_size: {size}, symmetric: {symmetric}}}\nformat: {{name: {format}}}\n"


def artifact_of(model: Path, folder: Path, recipe: str, *settings: str) -> Path:
    """An artifact by a recipe's name or text; calibration is small."""
    if ":" in recipe:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "own.yaml"
        file.write_text(recipe)
        recipe = str(file)
    quantize(
        recipe,
        model=str(model),
        out=folder / "artifact",
        settings=[*settings, "calibration.sequences=4", "calibration.length=64"],
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
    )
    return folder / "artifact"


def rtn(bits: int, symmetric: bool, format_: str = "autogptq", size: int | None = 32) -> str:
    return RTN.format(
        bits=bits, size="null" if size is None else size, symmetric=str(symmetric).lower(), format=format_
    )


def exported(artifact: Path, out: Path, *, exact: bool = True, force: bool = False) -> Manifest:
    return export(artifact, out, exact=exact, force=force, progress=Progress(quiet=True))


def assert_same_weights(artifact: Path, out: Path, type_name: str) -> None:
    """Every tensor of the file decodes to the artifact's, and the quantized ones are of a type."""
    before, after = open_artifact(artifact), open_artifact(out)
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        assert torch.equal(before.read(name).float(), after.read(name)), name
        found = after.quantized(name)
        assert (found is None) == (before.quantized(name) is None), name
        if found is not None:
            assert isinstance(found, BlockTensor) and found.type_name == type_name


CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "gptq-v1-sym": (rtn(4, True), (), "Q4_0"),
    "gptq-v1-asym": (rtn(4, False), ("format.checkpoint_format=gptq",), "Q5_0"),
    "gptq-v2-asym": (rtn(4, False), ("format.checkpoint_format=gptq_v2",), "Q5_0"),
    "gptq-v2-sym": (rtn(4, True), ("format.checkpoint_format=gptq_v2",), "Q4_0"),
    "awq-asym": (rtn(4, False, "autoawq", 64), (), "Q5_0"),
    "awq-sym": (rtn(4, True, "autoawq"), (), "Q4_0"),
    "compressed-sym": (rtn(4, True, "compressed-tensors"), (), "Q4_0"),
    "compressed-asym": (rtn(4, False, "compressed-tensors"), (), "Q5_0"),
    "rtn-8bit": (rtn(8, True), (), "Q8_0"),
    "rtn-8bit-rows": (rtn(8, True, size=None), (), "Q8_0"),
    "rtn-3bit": (rtn(3, True), (), "Q4_0"),
    "float32": (rtn(4, True), ("model.dtype=float32",), "Q4_0"),
    "bfloat16": (rtn(4, True), ("model.dtype=bfloat16",), "Q4_0"),
    "gptq": ("gptq-4bit-g64", ("method.group_size=32",), "Q4_0"),
    "awq": ("awq-4bit-g64", ("method.group_size=32",), "Q5_0"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_same(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    recipe, settings, type_name = CASES[case]
    artifact = artifact_of(tiny_llama, tmp_path, recipe, *settings)
    out = tmp_path / "out" / "model.gguf"
    manifest = exported(artifact, out)
    assert_same_weights(artifact, out, type_name)
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.gguf", "quantkit.json"]
    assert manifest == read_manifest(out) and manifest.export is not None
    assert manifest.export["weights"] == {
        "tensors": 21, "equal": 21, "lowest_sqnr_db": None, "largest_difference": 0.0
    }  # fmt: skip
    kept = {"float32": "F32", "bfloat16": "BF16"}.get(case, "F16")
    file = GGUFSource(out).file
    assert file.tensors["output.weight"].type_name == file.tensors["token_embd.weight"].type_name == kept
    assert file.metadata["general.name"] == "tiny-llama"
    logits = manifest.export["logits"]
    assert logits["decoded"]["largest_difference"] == 0.0
    if installed() == VERSION:
        assert 0 <= logits["llama_cpp"]["kl_nats"] < 0.01
        assert logits["llama_cpp"]["largest_difference"] > 0  # it was run
    else:
        assert "not installed" in logits["llama_cpp"]["missing"]


def test_a_file_tells_what_it_was_made_from(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, "gptq-4bit-g64", "method.group_size=32")
    before = read_manifest(artifact)
    assert before is not None
    manifest = exported(artifact, tmp_path / "out" / "model.gguf")
    assert manifest.export is not None and manifest.export["exact"] is True
    made_from = manifest.export["artifact"]
    assert made_from["id"] == "artifact" and made_from["format"] == "autogptq"
    weights = next(file for file in before.files if file.name == "model.safetensors")
    assert made_from["files"] == [weights.model_dump()]
    same = ("recipe", "recipe_sha256", "source", "calibration", "method_name")
    assert all(getattr(manifest, key) == getattr(before, key) for key in same)
    assert manifest.format == "gguf" and manifest.method == f"{before.method}, as gguf Q4_0"
    record = manifest.tensors[0]
    assert record.requested.startswith("gptq 4-bit g32 sym") and record.applied == "gguf Q4_0"
    assert record.bits_per_weight == 4.5 and manifest.bits_per_weight == 4.5
    assert record.sqnr_db == next(one.sqnr_db for one in before.tensors if one.name == record.name)
    facts = inspect(tmp_path / "out")
    assert facts["method"] == manifest.method and facts["bits_per_weight"] == 4.5
    assert "exported from    artifact, autogptq" in words.inspection(facts)
    said = words.exported(manifest)
    assert "21 of 21 tensors decode to the same numbers" in said and "logits, decoded    KL 0 nats" in said


def test_artifacts_of_other_tools_need_no_manifest(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, rtn(4, True, "autoawq"))
    (artifact / "quantkit.json").unlink()
    out = tmp_path / "out" / "model.gguf"
    manifest = exported(artifact, out)
    assert_same_weights(artifact, out, "Q4_0")
    assert manifest.method == "awq 4-bit g32 sym, as gguf Q4_0" and manifest.method_name == "awq"
    assert manifest.source["id"] == "artifact" and manifest.recipe == {} and manifest.tensors[0].sqnr_db is None
    assert GGUFSource(out).file.metadata["general.name"] == "artifact"
    assert "recipe" not in words.inspection(inspect(out))


def test_a_tied_head_and_skipped_layers(tiny_llama_tied: Path, tmp_path: Path) -> None:
    recipe = rtn(4, True) + "overrides: {down_proj: skip, o_proj: {bits: 8}}\n"
    artifact = artifact_of(tiny_llama_tied, tmp_path, recipe)
    out = tmp_path / "out" / "model.gguf"
    manifest = exported(artifact, out)
    file = GGUFSource(out).file
    assert "output.weight" not in file.tensors
    types = [file.tensors[f"blk.0.{name}.weight"].type_name for name in ("attn_q", "attn_output", "ffn_down")]
    assert types == ["Q4_0", "Q8_0", "F16"]
    assert [record.applied for record in manifest.tensors].count("unquantized") == 2
    before, after = open_artifact(artifact), open_artifact(out)
    assert all(torch.equal(before.read(name).float(), after.read(name)) for name in before.names())


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi3"])
def test_other_families(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    model = write_family(tmp_path / "model", kind, tiny_llama)
    artifact = artifact_of(model, tmp_path, rtn(4, True))
    out = tmp_path / "out" / "model.gguf"
    manifest = exported(artifact, out)
    assert manifest.export is not None
    before, after = open_artifact(artifact), open_artifact(out)
    if kind == "qwen2":
        assert "model.layers.0.self_attn.k_proj.bias" in before.names()
    gains = kind == "gemma2"
    for name in before.names():
        if gains and name.endswith("norm.weight"):  # the file holds them plus 1
            torch.testing.assert_close(before.read(name).float(), after.read(name), rtol=0, atol=2**-24)
        else:
            assert torch.equal(before.read(name).float(), after.read(name)), name
    logits = manifest.export["logits"]
    assert logits["decoded"]["largest_difference"] < (1e-3 if gains else 1e-30)
    if installed() == VERSION:
        assert logits["llama_cpp"]["kl_nats"] < 0.02


def test_inexact_exports_keep_the_codes_and_say_what_changed(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, rtn(4, False, "autoawq"))
    out = tmp_path / "out" / "model.gguf"
    manifest = exported(artifact, out, exact=False)
    assert manifest.export is not None and manifest.export["exact"] is False
    assert manifest.bits_per_weight == 5.0 and manifest.export["types"]["Q4_1"] == 14
    weights = manifest.export["weights"]
    assert weights["equal"] == 21 - 14 and weights["lowest_sqnr_db"] > 55
    decoded = manifest.export["logits"]["decoded"]
    assert 0 < decoded["largest_difference"] < 0.05 and decoded["kl_nats"] < 1e-4
    assert all(record.sqnr_db is None for record in manifest.tensors if record.applied == "gguf Q4_1")
    assert "7 of 21 tensors decode to the same numbers, the others with an SQNR of" in words.exported(manifest)


def test_int8_rows_need_their_scales_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, "int8")
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(ModelError, match="64 scales are not float16 numbers") as caught:
        exported(artifact, out)
    assert "--no-exact" in (caught.value.hint or "")
    manifest = exported(artifact, out, exact=False)
    assert manifest.export is not None and manifest.export["types"]["Q8_0"] == 14
    assert manifest.export["weights"]["lowest_sqnr_db"] > 65


def _rewritten(artifact: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = artifact / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _acted(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0)[torch.arange(len(tensors[name])).roll(1)].contiguous()


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        (rtn(4, True, size=16), None, r"q_proj.weight \(4-bit g16 sym\): 2 of 2 blocks of 32 columns lie in several"),
        (rtn(4, True), _acted, r"1.mlp.down_proj.weight \(4-bit g32 sym\): 4 of 4 blocks of 32 columns lie in several"),
        (rtn(8, False), None, r"\(8-bit g32 asym\): codes lie -?\d+ to \d+ steps from their zero; Q8_0"),
        ("nf4", None, "its codes stand for the values of a codebook"),
    ],
    ids=["group-16", "act-order", "8-bit-asymmetric", "nf4"],
)
def test_what_no_type_holds(
    tiny_llama: Path,
    tmp_path: Path,
    recipe: str,
    change: Callable[[dict[str, torch.Tensor]], None] | None,
    message: str,
) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, recipe)
    if change is not None:
        _rewritten(artifact, change)
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(ModelError, match=message) as caught:
        exported(artifact, out)
    assert "Q4_0, Q4_1, Q5_0 and Q8_0 hold integers of up to 8 bits" in caught.value.message
    assert caught.value.hint
    assert not out.parent.exists()


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", intermediate_size=144)
    artifact = artifact_of(model, tmp_path, rtn(4, True, size=None))
    with pytest.raises(ModelError, match=r"0.mlp.down_proj.weight \(4-bit row sym\): .* do not divide rows of 144"):
        exported(artifact, tmp_path / "out" / "model.gguf")


def test_bfloat16_scales_that_float16_holds_are_taken(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, rtn(4, True, "compressed-tensors"))

    def coarse(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].bfloat16()

    def tiny(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_scale"][5, 1] = 2**-20 * (1 + 2**-7)

    _rewritten(artifact, coarse)
    out = tmp_path / "out" / "model.gguf"
    exported(artifact, out)
    assert_same_weights(artifact, out, "Q4_0")
    _rewritten(artifact, tiny)
    with pytest.raises(ModelError, match=r"0.mlp.up_proj.weight .*: 1 of 256 scales are not float16 numbers"):
        exported(artifact, out, force=True)
    assert exported(artifact, out, exact=False, force=True).export["weights"]["equal"] == 20  # type: ignore[index]


def test_outputs_that_may_not_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, rtn(4, True))
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        exported(artifact, tmp_path / "out")
    out = tmp_path / "out" / "model.gguf"
    first = exported(artifact, out)
    with pytest.raises(UsageError, match="exists"):
        exported(artifact, out)
    other = out.with_name("other.gguf")
    with pytest.raises(UsageError, match="belongs to another artifact, model") as caught:
        exported(artifact, other)
    assert str(out.parent / "other" / "other.gguf") in (caught.value.hint or "")
    assert exported(artifact, out, force=True).files == first.files
    shutil.copy(out, other)
    assert read_manifest(other) is None and read_manifest(out) is not None  # it is not of the file beside it
    (out.parent / "quantkit.json").unlink()
    with pytest.raises(UsageError, match="was not made by quantkit"):
        exported(artifact, out, force=True)
    with pytest.raises(ModelError, match="is a GGUF file already"):
        exported(out, tmp_path / "again" / "model.gguf")


def test_nothing_is_left_of_a_file_that_decodes_otherwise(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, rtn(4, True))
    right = module.to_blocks

    def wrong(tensor, type_name):  # type: ignore[no-untyped-def]
        made = right(tensor, type_name)
        made.data[3, 5] ^= 1
        return made

    monkeypatch.setattr(module, "to_blocks", wrong)
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(VerificationError, match="14 tensors decode to other weights"):
        exported(artifact, out)
    assert list(out.parent.iterdir()) == []


def test_the_command_prints_one_document(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = artifact_of(tiny_llama, tmp_path, rtn(4, True))
    capsys.readouterr()
    assert cli.execute(["export", str(artifact), str(tmp_path / "out" / "model.gguf"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["export"]["weights"]["equal"] == 21
    assert cli.execute(["export", str(artifact), str(tmp_path / "out" / "model.gguf")]) == 2
