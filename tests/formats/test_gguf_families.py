"""Every family in GGUF: llama.cpp's logits are those of transformers, and the file read back is the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes.families import SETTINGS, write_family
from oracles import llama_cpp
from oracles.memory_source import MemorySource, plans_of, store
from quantkit.formats.base import LinearPlan
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.model.gguf_source import GGUFSource
from quantkit.model.load import load_transformers
from quantkit.model.source import Source

FLOAT_ERROR = 3e-3
"""Largest relative error of logits from float files: llama.cpp keeps keys, values and a table of gelu in float16."""

Q8_ERROR = 5e-2
"""The same from Q8_0, whose products round weights and activations to 8 bits."""

IDS = [5, 300, 17, 42, 99, 7, 201, 12, 64, 3, 350, 8, *range(100, 150)]
"""Longer than the window of the models that have one."""


def _written(source: Source, folder: Path, type_name: str) -> Path:
    """A GGUF file with the linears in one type and the rest in float32, or all in float32."""
    if type_name != "f32":
        method = GGML(type=type_name, embedding_type=type_name)  # type: ignore[arg-type]
        (path,), _ = store(source, GGUF(), folder, method, torch.float32, head=method)
        return path
    folder.mkdir()
    plans = [LinearPlan(plan.name, plan.out_features, plan.in_features, None) for plan in plans_of(source, GGML())]
    assert GGUF().misfits(plans, source) == []
    writer = GGUF().writer(folder, source, plans, torch.float32)
    for name in source.names():
        if name != "lm_head.weight" or not source.tied_head:
            writer.add(name, source.read(name))
    (path,) = writer.finish()
    return path


def _logits(source: Source, ids: list[int]) -> torch.Tensor:
    """Logits of transformers after every token: float32 [tokens, vocabulary]."""
    with torch.no_grad():
        return load_transformers(source, torch.float32)(torch.tensor([ids])).logits[0]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.std() > 0.3  # so that a tolerance means something
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def _llama_cpp(path: Path, ids: list[int]) -> torch.Tensor:
    with llama_cpp.Model(path) as model:
        return torch.from_numpy(model.logits(ids))


@pytest.mark.engine
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("type_name", "tolerance"), [("f32", FLOAT_ERROR), ("f16", FLOAT_ERROR), ("q8_0", Q8_ERROR)])
def test_llama_cpp_computes_the_same(
    tiny_llama: Path, tmp_path: Path, kind: str, type_name: str, tolerance: float
) -> None:
    source = MemorySource(write_family(tmp_path / kind, kind, tiny_llama))
    path = _written(source, tmp_path / "out", type_name)
    error = _error(_llama_cpp(path, IDS), _logits(source, IDS))
    print(f"{kind} {type_name} {error:.2e}")
    assert error < tolerance


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("type_name", ["f32", "f16"])
def test_the_file_read_back_is_the_model(tiny_llama: Path, tmp_path: Path, kind: str, type_name: str) -> None:
    source = MemorySource(write_family(tmp_path / kind, kind, tiny_llama))
    back = GGUFSource(_written(source, tmp_path / "out", type_name))
    stored = [name for name in source.names() if name != "lm_head.weight" or not source.tied_head]
    assert sorted(back.names()) == sorted(stored)
    for name in stored:
        assert back.shape(name) == source.shape(name)
        assert torch.equal(back.read(name).float(), source.read(name)), name
    torch.testing.assert_close(_logits(back, IDS), _logits(source, IDS), rtol=0, atol=1e-5)
