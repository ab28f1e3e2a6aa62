"""Tensors that go through one at a time, in parts: the same artifact as a block at a time, and no block in memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import write_tiny_llama
from quantkit import streaming
from quantkit.errors import ModelError
from quantkit.formats import open_artifact
from quantkit.jobs import quantize, run_passes
from quantkit.manifest import Manifest
from quantkit.methods.base import BlockWeights
from quantkit.model.blocks import blocks_of
from quantkit.model.reader import SafetensorsSource, open_source
from quantkit.plan import plan_linears
from quantkit.progress import Progress
from quantkit.recipe import load_recipe

CPU = torch.device("cpu")
SETTINGS = {
    "gguf-q4_0": [],
    "gguf-q8_0": ["model.dtype=bfloat16"],
    "gguf-q4_k_m": [],
    "nf4": ["model.dtype=bfloat16"],
    "nf4-double": [],
    "int8": [],
    "rtn-4bit-g128": ["method.group_size=32"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of float32, whose tensors all have more rows than a part takes below."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_tiny_llama(folder, hidden_size=256, intermediate_size=512, head_dim=64)


def make(recipe: str, model: Path, out: Path, *settings: str) -> Manifest:
    return quantize(
        recipe,
        model=str(model),
        out=out,
        settings=[*SETTINGS.get(recipe, []), *settings],
        device="cpu",
        force=False,
        progress=Progress(quiet=True),
    )


@pytest.mark.parametrize("recipe", SETTINGS)
def test_parts_and_whole_tensors_give_the_same_files(
    recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(recipe, model, tmp_path / "whole")
    monkeypatch.setattr(streaming, "PART", 7 * 256)  # does not divide the rows of any matrix
    parts = make(recipe, model, tmp_path / "parts")
    assert parts.files == whole.files
    assert [record.model_dump(exclude={"sqnr_db"}) for record in parts.tensors] == [
        record.model_dump(exclude={"sqnr_db"}) for record in whole.tensors
    ]
    found, expected = ([record.sqnr_db for record in made.tensors if record.sqnr_db] for made in (parts, whole))
    assert found == pytest.approx(expected, rel=1e-6) and len(found) > 13


@pytest.mark.parametrize("recipe", ["gguf-q4_k_m", "nf4-double", "int8", "rtn-4bit-g128"])
def test_what_is_written_is_what_a_block_at_a_time_gives(
    recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PART", 7 * 256)
    make(recipe, model, tmp_path / "out")
    source, written = open_source(str(model)), open_artifact(tmp_path / "out")
    methods = {plan.name: plan.method for plan in plan_linears(load_recipe(recipe, SETTINGS[recipe]), source)}
    for block in blocks_of(source):
        weights = {linear: source.read(f"{linear}.weight") for linear in block.linears}
        given = BlockWeights(block, weights, methods={linear: methods[linear] for linear in weights})
        whole = methods[block.linears[0]].quantize_block(given, {})
        for linear, expected in whole.quantized.items():
            found = written.quantized(f"{linear}.weight")
            assert type(found) is type(expected)
            assert torch.equal(found.dequantize(), expected.dequantize()), linear


class CountingSource(SafetensorsSource):
    """Knows which of the tensors that it gave out are alive, and how many bytes of them there were at most."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.alive: dict[int, int] = {}
        self.most_bytes = 0
        self.given = 0

    def _count(self, tensor: Tensor) -> Tensor:
        self.given += 1
        key, size = self.given, tensor.numel() * tensor.element_size()
        self.alive[key] = size
        # views keep the storage, not the tensor
        weakref.finalize(tensor.untyped_storage(), self.alive.pop, key)
        self.most_bytes = max(self.most_bytes, sum(self.alive.values()))
        return tensor

    def read(self, name: str) -> Tensor:
        return self._count(super().read(name))

    def in_parts(self, name: str, rows: int) -> Iterator[Tensor]:
        for part in super().in_parts(name, rows):
            yield self._count(part)
            del part


@pytest.mark.parametrize("recipe", ["gguf-q8_0", "gguf-q4_k_m", "nf4", "int8"])
def test_no_block_is_held(recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PART", 16 * 256)
    source = CountingSource(model)
    run_passes(
        [("one", load_recipe(recipe, SETTINGS[recipe]), tmp_path / "out")], source, CPU, False, Progress(quiet=True)
    )
    sizes = {name: source.dtype(name).itemsize * math.prod(source.shape(name)) for name in source.names()}
    whole = [size for name, size in sizes.items() if "q_proj" in name or "k_proj" in name]
    if not recipe.startswith("gguf"):  # whose writers take quantized tensors whole
        whole = list(sizes.values())
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    # the next tensor is read while the last one is still at hand
    assert source.most_bytes <= 2 * max(whole) < block
    assert source.given > len(sizes)
    assert not source.alive


def test_a_bad_value_in_a_later_part_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PART", 16 * 256)

    class Damaged(SafetensorsSource):
        def in_parts(self, name: str, rows: int) -> Iterator[Tensor]:
            for index, part in enumerate(super().in_parts(name, rows)):
                if name == "model.layers.1.mlp.down_proj.weight" and index == 3:
                    part[5, 5] = float("nan")
                yield part

    out = tmp_path / "out"
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        run_passes([("one", load_recipe("gguf-q8_0", []), out)], Damaged(model), CPU, False, Progress(quiet=True))
    assert not out.exists()
