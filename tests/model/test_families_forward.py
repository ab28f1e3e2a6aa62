"""Every family block by block: the runner computes what transformers does, and folded scales change no output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fakes.families import SETTINGS, write_family
from oracles.memory_source import MemorySource
from quantkit.device import Arithmetic, arithmetic
from quantkit.maths import correction, fold
from quantkit.maths.correction import CorrectionAccumulator
from quantkit.maths.gram import InputStatistics, Look
from quantkit.methods.awq import AWQ
from quantkit.methods.base import BlockWeights
from quantkit.model.blocks import Block, LinearGroup, architecture_of, blocks_of, group_shape, head_dim, linear_shape
from quantkit.model.eight_bit import EightBitLinear
from quantkit.model.forward import BATCH_TOKENS, BlockRunner
from quantkit.model.hidden import HiddenStates
from quantkit.model.load import load_transformers
from quantkit.model.room import BlockSizes
from quantkit.model.stages import run_staged
from quantkit.model.waiting import Rows, Way, placed

IDS = torch.arange(4 * 48).reshape(4, 48) % 380
CPU = torch.device("cpu")


@pytest.fixture(params=SETTINGS)
def source(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> MemorySource:
    return MemorySource(write_family(tmp_path / "model", request.param, tiny_llama))


def _statistics(
    runner: BlockRunner, block: Block, tensors: dict[str, Tensor], hidden: HiddenStates
) -> dict[str, InputStatistics]:
    """Run a block over the hidden states, which become its outputs."""
    with runner.loaded(block, tensors) as module:
        return runner.statistics(module, block, hidden, advance=True)[Look.WHOLE]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_blocks_one_after_the_other_give_the_models_states(source: MemorySource, stored: torch.dtype) -> None:
    source.tensors = {name: tensor.to(stored) for name, tensor in source.tensors.items()}
    runner = BlockRunner(source, CPU, arithmetic(CPU, torch.float32, exact=True))
    hidden = runner.embed(IDS)
    for block in blocks_of(source):
        seen = _statistics(runner, block, {name: source.read(name) for name in block.tensors}, hidden)
        for linear in block.linears:
            assert seen[linear].gram.shape[0] == linear_shape(source, linear)[1]
    model = load_transformers(source, torch.float32)
    norm = model.get_submodule(architecture_of(source.config).final_norm)
    with torch.no_grad():
        expected = model.get_submodule(runner.architecture.trunk)(IDS).last_hidden_state
        torch.testing.assert_close(norm(hidden[:]), expected, rtol=1e-4, atol=1e-4)


def test_a_block_leaves_the_empty_weights_that_it_found(source: MemorySource) -> None:
    """New ones of every block lie scattered over the heap, each in a page that then cannot go back."""
    runner = BlockRunner(source, CPU, arithmetic(CPU, torch.float32, exact=True))
    block = blocks_of(source)[0]
    before = dict(runner.layers[block.index].named_parameters())
    with runner.loaded(block, {name: source.read(name) for name in block.tensors}) as module:
        assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    after = dict(runner.layers[block.index].named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert {parameter.device.type for parameter in after.values()} == {"meta"}


@pytest.mark.parametrize("linears", [torch.float32, torch.bfloat16])
def test_blocks_in_eight_bits_give_nearly_the_same(source: MemorySource, linears: torch.dtype) -> None:
    exact = BlockRunner(source, CPU, arithmetic(CPU, torch.float32, exact=True))
    eighth = BlockRunner(source, CPU, Arithmetic(torch.float32, linears, False, True))
    block = blocks_of(source)[0]
    tensors = {name: source.read(name) for name in block.tensors}
    states = []
    for runner in (exact, eighth):
        hidden = runner.embed(IDS)
        with runner.loaded(block, tensors) as module:
            runner.statistics(module, block, hidden, advance=True)
            coded = [one for one in module.modules() if isinstance(one, EightBitLinear) and one._coded]
        states.append(hidden[:])
    plain = not block.transposed  # others are no linears of torch's, and stay as they are
    assert len(coded) == (len(block.linears) if plain else 0)
    apart = float((states[1] - states[0]).norm() / states[0].norm())
    if plain or linears == torch.bfloat16:
        assert 0 < apart < 0.03
    else:
        assert apart < 1e-6, "compiled attention in float32, and nothing rounded"


def test_folded_scales_leave_every_block_as_it_was(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table names a producer only where dividing it is exact; every group that has one is given a scale here."""
    monkeypatch.setattr(fold, "search_scale", lambda _, mean_abs, *__: (fold.candidate_scale(mean_abs, 0.5), 0.5))
    offset = architecture_of(source.config).norm_offset
    runner = BlockRunner(source, CPU, arithmetic(CPU, torch.float32, exact=True))
    hidden = runner.embed(IDS)
    for block in blocks_of(source):
        tensors = {name: source.read(name).clone() for name in block.tensors}
        folded = hidden.copy()
        seen = _statistics(runner, block, tensors, hidden)
        weights = {linear: block.oriented(tensors[f"{linear}.weight"]) for linear in block.linears}
        others = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in weights}
        work = AWQ(group_size=32).begin(BlockWeights(block, weights, others, offset, head_dim(source.config)))
        work.fold(seen)
        for group in block.groups:
            if group.producer is not None:
                assert not torch.equal(work.weights[group.linears[0]], weights[group.linears[0]])
        now = {f"{name}.weight": block.oriented(weight) for name, weight in work.weights.items()}
        _statistics(runner, block, tensors | now | work.replaced, folded)
        torch.testing.assert_close(folded[:], hidden[:], rtol=1e-4, atol=1e-4)


def test_what_outputs_are_added_to_is_what_the_table_says(source: MemorySource) -> None:
    """The states that enter `added_to` and the outputs make the next such states, at last the block's own output."""
    runner = BlockRunner(source, CPU, arithmetic(CPU, torch.float32, exact=True))
    hidden = runner.embed(IDS)
    block = blocks_of(source)[0]
    groups = [group for group in block.groups if group.added_to]
    assert len(groups) == (0 if "Gemma" in source.config["architectures"][0] else 2)
    states, outputs = [], []
    with runner.loaded(block, {name: source.read(name) for name in block.tensors}) as module:
        for group in groups:
            assert group.added_to is not None
            entered = module.get_submodule(group.added_to.removeprefix(block.prefix))
            linear = module.get_submodule(group.linears[0].removeprefix(block.prefix))
            entered.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].clone()))
            linear.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
        runner.statistics(module, block, hidden, advance=True)
    sums = [state + output for state, output in zip(states, outputs, strict=True)]
    for found, expected in zip(sums, [*states[1:], hidden[:]] if groups else [], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("waiting", [4, 2, 0])
def test_rows_beside_bring_their_states(source: MemorySource, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "FAR", float("inf"))
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 1)  # a sequence each
    runner = BlockRunner(source, CPU, arithmetic(CPU, torch.float32, exact=True))
    hidden = runner.embed(IDS)
    block = blocks_of(source)[0]
    tensors = {name: source.read(name) for name in block.tensors}
    beside = hidden.copy()
    apart = 0.1 * torch.randn(hidden[:].shape, generator=torch.Generator().manual_seed(0))
    beside[:] = hidden[:] + apart
    found: dict[str, CorrectionAccumulator | None] = {}

    class Rounder:
        def round(
            self, group: LinearGroup, seen: InputStatistics, correction: CorrectionAccumulator | None
        ) -> dict[str, Tensor]:
            found[group.linears[0]] = correction
            return {}

        def input_scale(self, group: LinearGroup) -> Tensor | None:
            return None

    inputs: list[Tensor] = []
    first = next((group for group in block.groups if group.added_to), None)
    with runner.loaded(block, tensors) as module:
        own = {parameter.data_ptr() for parameter in module.parameters()}
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("weights are not copied to be let go"))
            twin = runner.twin(block, tensors)
        assert own == {parameter.data_ptr() for parameter in module.parameters()}
        if first is not None:
            linear = module.get_submodule(first.linears[0].removeprefix(block.prefix))
            linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
        shapes = tuple(group_shape(source, group) for group in block.groups)
        sizes = BlockSizes(
            shapes, hidden.shape[2], 48, 4, 4, 4, 4, 4, 4, 2, "cpu", left_behind=(0, 0), states_in_memory=True
        )
        rows = Rows(runner, block, [Way(module, hidden), Way(twin, beside)])
        run_staged(rows, placed(rows, sizes, waiting, None), Rounder(), sizes=sizes, advance=False)
    for group in block.groups:
        seen = found[group.linears[0]]
        assert seen is not None and len(seen.totals()) == (1 if group.added_to is None else 2)
    if first is not None:
        seen = found[first.linears[0]]
        assert seen is not None
        rows = torch.cat(inputs[: len(IDS)])  # the first stop of each there is at this group
        expected = apart.flatten(0, 1).T @ rows.flatten(0, 1)
        torch.testing.assert_close(seen.totals()[1], expected, rtol=1e-4, atol=1e-4)
