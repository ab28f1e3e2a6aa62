"""Every family through the whole pipeline: what a method wrote, read back, still computes about what the model did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes.families import SETTINGS, write_family
from fakes.runs import quietly
from quantkit.errors import RecipeError
from quantkit.formats import open_artifact
from quantkit.manifest import Manifest
from quantkit.model.load import load_transformers
from quantkit.model.reader import open_source
from quantkit.model.source import Source

IDS = torch.arange(48)[None] * 7 % 380
SETS = ["calibration.sequences=8", "calibration.length=64"]

RECIPES: dict[str, tuple[list[str], float]] = {
    "gptq-4bit-g128": (["method.group_size=32"], 0.55),
    "awq-4bit-g128": (["method.group_size=32"], 0.55),
    "nf4": ([], 0.55),
    "int8": ([], 0.05),
    "gguf-q8_0": ([], 0.05),
}
"""What a recipe needs for a tiny model, and the largest relative error of its logits: unrelated ones differ by 1.4."""


def _make(recipe: str, model: Path, out: Path, *settings: str) -> Manifest:
    return quietly(recipe, model, out, [*SETS, *settings])


def _logits(source: Source) -> torch.Tensor:
    with torch.no_grad():
        return load_transformers(source, torch.float32)(IDS).logits[0]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean()).norm())


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_works_on_every_family(tiny_llama: Path, tmp_path: Path, kind: str, recipe: str) -> None:
    model = write_family(tmp_path / "model", kind, tiny_llama)
    settings, tolerance = RECIPES[recipe]
    made = _make(recipe, model, tmp_path / "out", *settings)
    source = open_source(str(model))
    error = _error(_logits(open_artifact(tmp_path / "out")), _logits(source))
    print(f"{kind} {recipe} {error:.3f}")
    assert error < tolerance
    blocks = {record.name: record for record in made.tensors if record.name != "lm_head"}
    assert all(record.applied != "unquantized" and record.reason is None for record in blocks.values())


def _as_published(model: Path) -> None:
    """Names and masks as in the checkpoint of GPT-2 that everyone has: saved from the trunk, with a mask a block."""
    path = model / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 256, 256).tril() for index in range(3)}
    save_file(tensors | masks, path, metadata={"format": "pt"})


def test_gpt2_becomes_gguf_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    model = write_family(tmp_path / "model", "gpt2", tiny_llama)
    expected = _logits(open_source(str(model)))
    _as_published(model)
    source = open_source(str(model))
    assert torch.equal(_logits(source), expected)
    _make("gguf-q8_0", model, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    assert _error(_logits(artifact), expected) < 0.03
    assert not any(name.endswith(".attn.bias") for name in artifact.names())
    with pytest.raises(RecipeError, match="format autogptq: GPT2LMHeadModel keeps its linears as Conv1D") as caught:
        _make("gptq-4bit-g128", model, tmp_path / "no", "method.group_size=32")
    assert caught.value.hint is not None
