"""Which models attend by the causal attention, and that they compute what they did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.families import SETTINGS, write_family
from oracles.memory_source import MemorySource
from quantkit.device import Arithmetic
from quantkit.model import attention
from quantkit.model.blocks import blocks_of
from quantkit.model.forward import BlockRunner
from quantkit.model.source import Source

IDS = torch.arange(4 * 48).reshape(4, 48) % 380
CPU = torch.device("cpu")
MIXED = [
    pytest.param(Arithmetic(torch.float32, torch.bfloat16, False, False), id="bfloat16"),
    pytest.param(Arithmetic(torch.float32, torch.float32, True, True), id="float32 and 8 bits"),
]
OTHERWISE = {"gemma2"}
"""Families whose attention asks for more than causal attention: a cap on the scores."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The queries' shape at every call of the causal attention."""
    seen: list[tuple[int, ...]] = []
    theirs = attention.causal_attention

    def count(query: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return theirs(query, *rest)

    monkeypatch.setattr(attention, "causal_attention", count)
    return seen


def states(source: Source, how: Arithmetic) -> Tensor:
    """Hidden states behind the last block."""
    runner = BlockRunner(source, CPU, how)
    hidden = runner.embed(IDS)
    for block in blocks_of(source):
        with runner.loaded(block, {name: source.read(name) for name in block.tensors}) as module:
            runner.statistics(module, block, hidden, advance=True)
    return hidden[:]


@pytest.mark.parametrize("how", MIXED)
@pytest.mark.parametrize("family", SETTINGS)
def test_states_are_as_near_to_float32_as_with_pytorchs(
    how: Arithmetic,
    family: str,
    tiny_llama: Path,
    tmp_path: Path,
    calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = MemorySource(write_family(tmp_path / "model", family, tiny_llama))
    ours = states(source, how)
    assert bool(calls) == (family not in OTHERWISE)
    exact = states(source, Arithmetic(torch.float32, torch.float32, False, False))
    monkeypatch.setattr(attention, "use_causal_attention", lambda _: None)
    theirs = states(source, how)
    # GPT-2's linears are of a class of their own, which nothing but attention rounds
    assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm() + 1e-6 * exact.norm()
    assert torch.equal(ours, theirs) == (family in OTHERWISE)


def test_float32_throughout_takes_pytorchs(tiny_llama: Path, calls: list[tuple[int, ...]]) -> None:
    states(MemorySource(tiny_llama), Arithmetic(torch.float32, torch.float32, False, False))
    assert not calls
