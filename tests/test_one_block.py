"""One block of one job whose linears see what was rounded before them: what is held meanwhile, and what runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fakes.runs import quietly
from quantkit import device as devices
from quantkit import one_block, pipeline
from quantkit.device import Arithmetic
from quantkit.manifest import Manifest
from quantkit.maths import four_bit
from quantkit.maths.gram import GramAccumulator, InputStatistics
from quantkit.memory import FreedMemory
from quantkit.methods.calibrated import CalibratedBlock
from quantkit.model import eight_bit, forward
from quantkit.model.blocks import LinearGroup
from quantkit.model.eight_bit import EightBitLinear
from quantkit.model.forward import BlockRunner
from quantkit.model.room import BlockSizes
from quantkit.model.waiting import Rows
from quantkit.tensors import GroupTensor


def make(recipe: str, model: Path, out: Path, *settings: str) -> Manifest:
    small = ["calibration.sequences=6", "calibration.length=64"]
    return quietly(recipe, model, out, [*small, "method.propagate=quantized", *settings], force=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gptq-4bit-g64", "gptq-4bit-g64-plain", "awq-4bit-g64-nearest"])
def test_stored_weights_are_let_go_as_they_are_rounded(
    name: str, dtype: torch.dtype, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored_as(tiny_llama, tmp_path / "model", dtype)
    stored: dict[str, StorageWeakRef] = {}
    read, round_group, staged = pipeline._read, CalibratedBlock.round, one_block.run_staged
    asked: list[str] = []

    def note_read(*args: Any, **settings: Any) -> Any:
        for block, tensors in read(*args, **settings):
            stored.clear()
            weights = {linear: tensors[f"{linear}.weight"] for linear in block.linears}
            stored.update({linear: StorageWeakRef(weight.untyped_storage()) for linear, weight in weights.items()})
            del weights
            yield block, tensors

    def note_staged(rows: Rows, *args: Any, **settings: Any) -> None:
        block, module = rows.block, rows.ways[0].module
        linears = [module.get_submodule(linear.removeprefix(block.prefix)) for linear in block.linears]
        assert all(linear.weight.is_meta for linear in linears), "none is to run before it is rounded"
        staged(rows, *args, **settings)

    def note_round(self: CalibratedBlock, group: LinearGroup, *args: Any) -> Any:
        asked.extend(group.linears)
        later = {linear for one in self.given.block.groups for linear in one.linears if linear not in asked}
        held = {linear for linear, storage in stored.items() if not storage.expired()}
        assert held == later | set(group.linears), "in their own dtype, until they are rounded"
        return round_group(self, group, *args)

    monkeypatch.setattr(pipeline, "_read", note_read)
    monkeypatch.setattr(one_block, "run_staged", note_staged)
    monkeypatch.setattr(CalibratedBlock, "round", note_round)
    make(name, model, tmp_path / "out")
    assert len(asked) == 14, "two blocks of seven"


def stored_as(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint in another dtype."""
    shutil.copytree(model, folder)
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_linears_that_stay_are_coded_by_the_inputs_of_the_whole_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, stay = one_block.run_staged, []

    def note_staged(rows: Rows, *args: Any, **settings: Any) -> None:
        linear = rows.ways[0].module.self_attn.k_proj
        assert isinstance(linear, EightBitLinear) and not linear.weight.is_meta and linear._coded is not None
        assert linear._coded[0] is not linear.weight, "what was coded while scales were looked for is of no use now"
        stay.append(linear)
        staged(rows, *args, **settings)

    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: Arithmetic(torch.float32, torch.bfloat16, False, True))
    monkeypatch.setattr(one_block, "run_staged", note_staged)
    make("gptq-4bit-g64", tiny_llama, tmp_path / "out", "skip=[lm_head, k_proj]")
    assert len(stay) == 2


@pytest.mark.parametrize("name", ["gptq-4bit-g64", "gptq-4bit-g64-plain"])
def test_a_block_of_which_nothing_is_quantized_is_passed(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    manifest = make(name, tiny_llama, tmp_path / "out", "skip=[lm_head, layers.0.]")
    done = {record.name: record.applied for record in manifest.tensors}
    assert len([name for name, applied in done.items() if applied == "unquantized" and "layers.0." in name]) == 7
    assert len([name for name, applied in done.items() if applied != "unquantized" and "layers.1." in name]) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_held_as_they_are_stored_until_they_are_coded_in_eight_bits(
    dtype: torch.dtype, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored_as(tiny_llama, tmp_path / "model", dtype)
    seen, coded, code, tried = [], [], EightBitLinear._code, eight_bit.eight_bit_weight

    def note(self: EightBitLinear, inputs: Tensor) -> Any:
        seen.append(self.weight.dtype)
        return code(self, inputs)

    def note_coded(weight: Tensor, *rest: Any) -> Any:
        coded.append(weight.dtype)
        return tried(weight, *rest)

    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: Arithmetic(torch.float32, torch.float32, False, True))
    monkeypatch.setattr(EightBitLinear, "_code", note)
    monkeypatch.setattr(eight_bit, "eight_bit_weight", note_coded)
    make("gptq-4bit-g64-plain", model, tmp_path / "out", "method.propagate=unquantized")
    assert seen == [dtype] * 13, "all but the last down_proj, which need not run"
    assert coded == [torch.bfloat16 if dtype == torch.bfloat16 else torch.float32] * 13, "widened where it has to be"


def test_inputs_are_let_go_with_the_last_batch(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def noting(name: str) -> Any:
        function = getattr(GramAccumulator, name)

        def note(self: GramAccumulator, *given: Any) -> Any:
            called.append(name)
            return function(self, *given)

        return note

    for name in ("add", "settle", "result"):
        monkeypatch.setattr(GramAccumulator, name, noting(name))
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 4 * 64)  # four of six sequences, then two
    make("gptq-4bit-g64-plain", tiny_llama, tmp_path / "out", "method.propagate=unquantized")
    block = 4 * ["add"] + 4 * ["add", "settle"] + 4 * ["result", "settle"]
    assert called == 2 * block


@pytest.mark.parametrize("scales", [False, True])
def test_gram_matrices_are_let_go_as_their_linears_are_rounded_the_largest_first(
    scales: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams: list[StorageWeakRef] = []
    held: list[tuple[str, int]] = []
    result, round_seen = GramAccumulator.result, CalibratedBlock._round_seen

    def note_result(self: GramAccumulator) -> InputStatistics:
        found = result(self)
        grams.append(StorageWeakRef(found.gram.untyped_storage()))
        return found

    def note_round(self: CalibratedBlock, ours: list[str], *rest: Any) -> None:
        held.append((ours[0].split(".")[-1], sum(not gram.expired() for gram in grams)))
        round_seen(self, ours, *rest)

    monkeypatch.setattr(GramAccumulator, "result", note_result)
    monkeypatch.setattr(CalibratedBlock, "_round_seen", note_round)
    name = "gptq-4bit-g64" if scales else "gptq-4bit-g64-plain"
    make(name, tiny_llama, tmp_path / "out", "method.propagate=unquantized")
    fewer = 1 if scales else 0  # where scales are divided out of a matrix, what they are divided out of goes at once
    linears = ("down_proj", "q_proj", "o_proj", "gate_proj")
    assert held == 2 * [(linear, 4 - place - fewer) for place, linear in enumerate(linears)]


@pytest.mark.skipif(not devices.has_avx2(), reason="the loops are AVX2's")
@pytest.mark.parametrize("recipe", ["gptq-4bit-g64", "awq-4bit-g64-nearest"])
def test_rounded_weights_are_multiplied_by_the_codes_that_are_written(
    recipe: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, coded, round_group = [], [], CalibratedBlock.round
    four_bits = four_bit.four_bit_weight

    def note_round(self: CalibratedBlock, *args: Any) -> Any:
        found = round_group(self, *args)
        made.extend(found.values())
        return found

    def note(weight: GroupTensor, *rest: Any) -> Any:
        coded.append(weight)
        return four_bits(weight, *rest)

    by_codes = Arithmetic(torch.float32, torch.float32, False, True, True)
    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: by_codes)
    monkeypatch.setattr(eight_bit, "four_bit_weight", note)
    monkeypatch.setattr(CalibratedBlock, "round", note_round)
    make(recipe, tiny_llama, tmp_path / "near", "method.group_size=32")
    # all of both blocks but the last down_proj, behind which nothing is looked at, in the order they were rounded in
    assert len(coded) == 13 and [id(weight) for weight in coded] == [id(tensor) for tensor in made[:13]]
    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: Arithmetic(torch.float32, torch.float32, False, False))
    make(recipe, tiny_llama, tmp_path / "exact", "method.group_size=32")
    assert len(coded) == 13 and all(isinstance(weight, Tensor) for weight in made[14:]), "not in float32"
    near, exact = (load_file(tmp_path / folder / "model.safetensors") for folder in ("near", "exact"))
    codes = [name for name in exact if name.endswith("qweight")]
    same = [
        float(((near[name] >> bit & 15) == (exact[name] >> bit & 15)).float().mean())
        for name in codes
        for bit in range(0, 32, 4)
    ]
    assert sum(same) / len(same) > 0.8, "few codes fall otherwise, of 16 that there are"


def test_no_gram_matrix_is_held_while_rounded_weights_are_assigned(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded, assign, behind = [], BlockRunner.assign_rounded, 0
    round_group = CalibratedBlock.round

    def note_round(self: CalibratedBlock, group: LinearGroup, gram: Tensor, *rest: Any) -> Any:
        rounded.append(StorageWeakRef(gram.untyped_storage()))
        return round_group(self, group, gram, *rest)

    def note_assign(self: BlockRunner, *args: Any) -> None:
        nonlocal behind
        assert rounded.pop().expired()
        behind += 1
        assign(self, *args)

    monkeypatch.setattr(CalibratedBlock, "round", note_round)
    monkeypatch.setattr(BlockRunner, "assign_rounded", note_assign)
    make("gptq-4bit-g64", tiny_llama, tmp_path / "out")
    assert behind == 8, "two blocks of four groups"


def test_freed_memory_may_go_back_before_and_behind_each_rounding(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(owner: type, name: str) -> None:
        own = getattr(owner, name)

        def note(*args: Any, **more: Any) -> Any:
            done.append(name)
            return own(*args, **more)

        monkeypatch.setattr(owner, name, note)

    noted(CalibratedBlock, "round")
    noted(BlockRunner, "assign_rounded")
    noted(BlockSizes, "rounding_bytes")
    noted(FreedMemory, "give_back")
    small = ["calibration.sequences=6", "calibration.length=64", "method.propagate=quantized"]
    quietly("gptq-4bit-g64-plain", tiny_llama, tmp_path / "out", small, max_memory="3GB")
    each = ["rounding_bytes", "give_back", "round", "assign_rounded", "give_back"]
    places = [at for at, name in enumerate(done) if name == "round"]
    assert [done[at - 2 : at + 3] for at in places] == [each] * 8
