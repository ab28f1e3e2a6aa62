"""Mixed arithmetic: what is chosen where, and that a run in it gives what a float32 run gives but for its rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_tiny_llama
from fakes.runs import same_but_for_the_manifest
from quantkit import device as devices
from quantkit.device import Arithmetic, arithmetic
from quantkit.formats import open_artifact
from quantkit.jobs import quantize
from quantkit.manifest import Manifest
from quantkit.maths.gram import GramAccumulator
from quantkit.methods.calibrated import CalibratedBlock
from quantkit.model.forward import BATCH_TOKENS
from quantkit.model.room import BlockSizes
from quantkit.progress import Progress

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EVERYTHING = {"amx_bf16": True, "avx512_vnni": True}


@pytest.mark.parametrize(
    ("capabilities", "device", "source", "linears", "gram_in_8", "linears_in_8"),
    [
        (EVERYTHING, CPU, torch.float16, torch.bfloat16, True, True),
        (EVERYTHING, CPU, torch.float32, torch.float32, True, False),  # weights that would be rounded stay as they are
        ({"avx512_bf16": True}, CPU, torch.bfloat16, torch.bfloat16, False, False),
        ({"avx512_vnni": True}, CPU, torch.float16, torch.float32, True, True),
        ({}, CPU, torch.float16, torch.float32, False, False),
        ({"avx2": True}, CPU, torch.bfloat16, torch.float32, True, True),  # pairs of 16-bit integers
        ({"avx2": True}, CPU, torch.float32, torch.float32, True, False),
        ({"avx2": True, "avx512_f": True}, CPU, torch.bfloat16, torch.float32, False, False),
        (EVERYTHING, GPU, torch.float16, torch.float16, False, False),
        (EVERYTHING, GPU, torch.float32, torch.float32, False, False),
    ],
)
def test_products_take_the_units_that_are_there(
    capabilities: dict[str, bool],
    device: torch.device,
    source: torch.dtype,
    linears: torch.dtype,
    gram_in_8: bool,
    linears_in_8: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    chosen = arithmetic(device, source)
    assert (chosen.linears, chosen.eight_bit_gram, chosen.eight_bit_linears) == (linears, gram_in_8, linears_in_8)
    assert chosen.four_bit_linears == (linears_in_8 and "avx2" in capabilities), "units for 8 bits are as fast at them"
    assert arithmetic(device, source, exact=True) == Arithmetic(torch.float32, torch.float32, False, False)


@pytest.fixture(scope="module")
def half_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float16 whose inputs are wide enough for 8-bit sums."""
    folder = tmp_path_factory.mktemp("half") / "llama"
    write_tiny_llama(folder, hidden_size=256, intermediate_size=320)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def make(model: Path, out: Path, *settings: str, max_memory: str | None = None) -> Manifest:
    return quantize(
        "gptq-4bit-g64",
        model=str(model),
        out=out,
        settings=["calibration.sequences=6", "calibration.length=64", *settings],
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
        max_memory=max_memory,
    )


@pytest.fixture
def all_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of a processor with every unit; where there is none, the products are emulated."""
    monkeypatch.setattr(devices, "_can", lambda *_: True)


def test_a_mixed_run_gives_nearly_what_a_float32_run_gives(half_llama: Path, tmp_path: Path, all_units: None) -> None:
    mixed = make(half_llama, tmp_path / "mixed")
    exact = make(half_llama, tmp_path / "exact", "calibration.precision=float32")
    assert mixed.calibration is not None and exact.calibration is not None
    assert mixed.calibration["arithmetic"] == "linears int8 or bfloat16, Gram int8"
    assert exact.calibration["arithmetic"] == "linears float32, Gram float32"
    for ours, theirs in zip(mixed.tensors, exact.tensors, strict=True):
        assert ours.sqnr_db == pytest.approx(theirs.sqnr_db, abs=0.2), ours.name
    differs = [
        name
        for name in open_artifact(tmp_path / "mixed").names()
        if not torch.equal(open_artifact(tmp_path / "mixed").read(name), open_artifact(tmp_path / "exact").read(name))
    ]
    assert differs, "the two runs must not have taken the same path"


has_avx2 = pytest.mark.skipif(not devices.has_avx2(), reason="its loops run nowhere else")
WITHOUT_BFLOAT16 = ["avx512_vnni", pytest.param("avx2", marks=has_avx2)]


@pytest.mark.parametrize("units", ["all", *WITHOUT_BFLOAT16])
def test_a_memory_limit_changes_no_byte_of_a_mixed_run(
    units: str, half_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_can", lambda *names: units in (*names, "all"))
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 128)  # two of the six sequences
    make(half_llama, tmp_path / "free")
    make(half_llama, tmp_path / "tight", max_memory="1MB")
    same_but_for_the_manifest(tmp_path / "free", tmp_path / "tight")
    monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_: 2)
    make(half_llama, tmp_path / "half")
    same_but_for_the_manifest(tmp_path / "free", tmp_path / "half")


@pytest.mark.parametrize("units", WITHOUT_BFLOAT16)
def test_without_units_for_bfloat16_linears_multiply_in_8_bits_or_float32(
    units: str, half_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_can", lambda *names: units in names)
    made = make(half_llama, tmp_path / "made")
    assert made.calibration is not None
    integers = "int4, int8" if units == "avx2" else "int8"
    assert made.calibration["arithmetic"] == f"linears {integers} or float32, Gram int8"
    exact = make(half_llama, tmp_path / "exact", "calibration.precision=float32")
    for ours, theirs in zip(made.tensors, exact.tensors, strict=True):
        assert ours.sqnr_db == pytest.approx(theirs.sqnr_db, abs=0.2), ours.name


def test_what_quantizes_is_not_in_the_arithmetic_of_the_block(
    half_llama: Path, tmp_path: Path, all_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, inputs = [], []
    rounding, adding = CalibratedBlock.round, GramAccumulator.add

    def watched_round(self: Any, *args: Any) -> Any:
        found.append(torch.is_autocast_enabled("cpu"))
        return rounding(self, *args)

    def watched_add(self: Any, rows: torch.Tensor) -> None:
        found.append(torch.is_autocast_enabled("cpu"))
        inputs.append(rows.dtype)
        adding(self, rows)

    monkeypatch.setattr(CalibratedBlock, "round", watched_round)
    monkeypatch.setattr(GramAccumulator, "add", watched_add)
    make(half_llama, tmp_path / "out")
    assert found and not any(found)
    assert torch.bfloat16 in inputs, "nothing ran in the block's own arithmetic"
    assert not torch.is_autocast_enabled("cpu")
