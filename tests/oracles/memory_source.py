"""A source whose tensors are in memory, and the plainest way through a method and a writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.formats.base import Format, LinearPlan
from quantkit.methods.base import BlockWeights, Method
from quantkit.model.blocks import blocks_of, linear_shape
from quantkit.model.front_matter import front_matter
from quantkit.model.source import Source


class MemorySource(Source):
    """A Hugging Face folder with one safetensors file, loaded whole."""

    kind = "safetensors"

    def __init__(self, folder: Path):
        self.path = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def tokenizer_folder(self) -> Path:
        return self.path

    def side_files(self) -> list[Path]:
        return []

    def card(self) -> dict[str, Any]:
        return front_matter(self.path)

    def lineage(self) -> dict[str, Any]:
        return {"kind": self.kind, "id": self.path.name}


def plans_of(source: Source, method: Method, head: Method | None = None) -> list[LinearPlan]:
    """The same method for every linear of the blocks; the head, where it is not tied, gets its own or none."""
    linears = [linear for block in blocks_of(source) for linear in block.linears]
    plans = [LinearPlan(linear, *linear_shape(source, linear), method) for linear in linears]
    if not source.tied_head:
        plans.append(LinearPlan("lm_head", *source.shape("lm_head.weight"), head))  # type: ignore[call-arg]
    return plans


def store(
    source: Source, fmt: Format, folder: Path, method: Method, dtype: torch.dtype, head: Method | None = None
) -> tuple[list[Path], dict[str, int]]:
    """Quantize and write a model; the paths written and {tensor name: bytes in the file}."""
    folder.mkdir(parents=True)
    plans = plans_of(source, method, head)
    assert fmt.misfits(plans, source) == []
    writer = fmt.writer(folder, source, plans, dtype)
    stored, inside = {}, set()
    for block in blocks_of(source):
        weights = {linear: block.oriented(source.read(f"{linear}.weight")) for linear in block.linears}
        given = BlockWeights(block, weights)
        result = method.quantize_block(given, {})
        for name in block.tensors:
            linear = name.removesuffix(".weight")
            quantized = result.quantized.get(linear) if name.endswith(".weight") else None
            stored[name] = writer.add(name, source.read(name).to(dtype) if quantized is None else quantized)
            inside.add(name)
    for name in source.names():
        if name in inside or (name == "lm_head.weight" and source.tied_head):
            continue
        if name == "lm_head.weight" and head is not None:
            given = BlockWeights(blocks_of(source)[0], {"lm_head": source.read(name)})
            stored[name] = writer.add(name, head.quantize_block(given, {}).quantized["lm_head"])
        else:
            stored[name] = writer.add(name, source.read(name).to(dtype))
    return writer.finish(), stored
