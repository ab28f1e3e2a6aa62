"""A block run in stages: where rows wait, which start again, and what is left when a run fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.families import SETTINGS, write_family
from fakes.runs import quietly, same_but_for_the_manifest
from quantkit import arena, one_block, pipeline
from quantkit.device import Arithmetic
from quantkit.errors import ModelError
from quantkit.memory import MemoryLimit
from quantkit.model import forward, scratch, stages, waiting
from quantkit.model.hidden import HiddenStates
from quantkit.model.room import BlockSizes
from quantkit.model.scratch import ScratchRoom


def make(model: Path, out: Path, *settings: str, force: bool = False) -> None:
    quietly("gptq-4bit-g64", model, out, ["calibration.sequences=6", "calibration.length=64", *settings], force=force)


def begun_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First sequences of the batches that start on their way through a block, as they do."""
    begun: list[int] = []
    begin = waiting.Rows.begin

    def note(self: Any, batch: slice, *, take: bool) -> Any:
        begun.append(batch.start)
        return begin(self, batch, take=take)

    monkeypatch.setattr(waiting.Rows, "begin", note)
    return begun


def sizes_of_blocks(monkeypatch: pytest.MonkeyPatch) -> list[BlockSizes]:
    """What blocks that are rounded are made of, as they come."""
    made: list[BlockSizes] = []
    sizes = one_block._sizes

    def note(*args: Any) -> BlockSizes:
        made.append(sizes(*args))
        return made[-1]

    monkeypatch.setattr(one_block, "_sizes", note)
    return made


def counted_behind_groups(monkeypatch: pytest.MonkeyPatch, count: Callable[[waiting.Rows], list[int]]) -> list[Any]:
    """What `count` gives behind each group that is rounded, all six sequences waiting, each as a batch."""
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_: 6)
    found: list[Any] = []
    round_group = stages._round_group

    def counted(rows: waiting.Rows, *args: Any) -> None:
        round_group(rows, *args)
        found.append(count(rows))

    monkeypatch.setattr(stages, "_round_group", counted)
    return found


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_as_many_rows_wait_as_there_is_room_for(
    correction: float, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 64)  # each of the six sequences is a batch
    made = sizes_of_blocks(monkeypatch)
    monkeypatch.setattr(ScratchRoom, "take", lambda *_: None)
    monkeypatch.setattr(MemoryLimit, "room_bytes", lambda *_: 10**9)
    begun = begun_batches(monkeypatch)
    settings = [f"method.correction={correction}"]
    make(tiny_llama, tmp_path / "6", *settings)
    begun.clear()
    assert made[0].shapes == ((128, 64), (64, 64), (256, 64), (64, 128))
    assert made[0].ways == (1 if correction == 0 else 2)
    assert (made[0].hidden, made[0].length, made[0].heads, made[0].stored_bytes) == (64, 64, 4, 4)
    assert made[0].states_in_memory
    for fit in (6, 4, 0):
        room = made[0].taken_bytes + fit * made[0].waiting_bytes
        monkeypatch.setattr(MemoryLimit, "room_bytes", lambda *_, room=room: room)
        make(tiny_llama, tmp_path / str(fit), *settings, force=True)
        first, second = [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5][fit:]
        # the first block starts the others for its four groups and for its outputs, the second has none to write
        assert begun == first[:fit] + 5 * second + first[:fit] + 4 * second
        begun.clear()
        same_but_for_the_manifest(tmp_path / "6", tmp_path / str(fit))


@pytest.mark.parametrize(("sequences", "stay"), [(6, [0, 4]), (4, [0]), (0, [])])
def test_a_short_last_batch_waits_only_with_all_others(
    sequences: int, stay: list[int], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 256)  # four of six sequences, then two
    monkeypatch.setattr(ScratchRoom, "take", lambda *_: None)
    monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_: sequences)
    begun = begun_batches(monkeypatch)
    make(tiny_llama, tmp_path / "out")
    again = [start for start in (0, 4) if start not in stay]
    assert begun == stay + 5 * again + stay + 4 * again


def test_rows_that_wait_hold_no_input_that_was_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[Tensor] = []
    add = stages._add_batch

    def note(*args: Any) -> Any:
        brought.append(args[4].inputs)
        return add(*args)

    monkeypatch.setattr(stages, "_add_batch", note)
    held = counted_behind_groups(monkeypatch, lambda _: [tensor.numel() for tensor in brought])
    make(tiny_llama, tmp_path / "out")
    each = [64 * columns for columns in (64, 64, 64, 128)]  # tokens of a batch times columns, one group after another
    assert held[:4] == [6 * at * [0] + 6 * [each[at]] for at in range(4)]


def test_rows_that_wait_hold_no_hidden_states_that_were_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []
    take = HiddenStates.take

    def note(self: HiddenStates, rows: slice) -> Tensor:
        taken.append(take(self, rows))
        return taken[-1]

    def count(rows: waiting.Rows) -> list[int]:
        assert rows.ways[0].hidden.storages == [], "what was taken is nowhere else"
        return [tensor.untyped_storage().nbytes() for tensor in taken]

    monkeypatch.setattr(HiddenStates, "take", note)
    held = counted_behind_groups(monkeypatch, count)
    make(tiny_llama, tmp_path / "out")
    # behind attention its outputs have been added to them
    assert held[:4] == 2 * [6 * [4 * 64 * 64]] + 2 * [6 * [0]]


ARITHMETIC = [
    pytest.param(Arithmetic(torch.float32, torch.float32, False, False), id="float32"),
    pytest.param(Arithmetic(torch.float32, torch.bfloat16, False, False), id="bfloat16"),
    pytest.param(Arithmetic(torch.float32, torch.float32, True, True, True), id="integers"),
]


@pytest.mark.parametrize("how", ARITHMETIC)
@pytest.mark.parametrize("correction", [0.0, 0.5])
@pytest.mark.parametrize("spill", [False, True])
def test_rows_without_room_wait_in_a_file(
    spill: bool,
    correction: float,
    how: Arithmetic,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 128)  # of the six sequences two are a batch
    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: how)
    begun = begun_batches(monkeypatch)
    sizes = sizes_of_blocks(monkeypatch)
    if spill:
        monkeypatch.setattr(MemoryLimit, "room_bytes", lambda *_: 0)
    settings = [f"method.correction={correction}"]
    for fit in (6, 2, 0):
        monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_, fit=fit: fit)
        begun.clear()
        make(tiny_llama, tmp_path / str(fit), *settings)
        here, away = [start for start in (0, 2, 4) if start < fit], [start for start in (0, 2, 4) if start >= fit]
        # the others start for the first group's inputs, which a norm gives, and once more to stay
        assert begun == 2 * (here + 2 * away)
        assert {each.states_in_memory for each in sizes} == {not spill}
        same_but_for_the_manifest(tmp_path / "6", tmp_path / str(fit))


@pytest.mark.parametrize("how", ARITHMETIC)
def test_blocks_leave_the_empty_weights_that_they_found(
    how: Arithmetic, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: how)
    found: list[tuple[Any, dict[str, Any]]] = []
    begin = forward.BlockRunner.__init__

    def note(self: Any, *args: Any) -> None:
        begin(self, *args)
        found.append((self.layers, dict(self.layers.named_parameters())))

    monkeypatch.setattr(forward.BlockRunner, "__init__", note)
    make(tiny_llama, tmp_path / "out")
    ((layers, before),) = found
    after = dict(layers.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("how", ARITHMETIC)
@pytest.mark.parametrize("family", SETTINGS)
def test_what_rows_hold_has_room_where_they_wait(
    family: str, how: Arithmetic, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every family's blocks hold tensors of their own between linears."""
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 128)
    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: how)
    model = write_family(tmp_path / "model", family, tiny_llama)
    recipe = ["gguf-q4_0-gptq"] if family == "gpt2" else ["gptq-4bit-g64"]
    short = ["calibration.sequences=6", "calibration.length=64"]
    held, left, here = [], [], []
    leave, sizes = waiting.InFile.leave, sizes_of_blocks(monkeypatch)

    def note(self: waiting.InFile) -> None:
        leave(self)
        left.append(waiting.held_by(self._tasks, self._rows.shared))
        held.append(sum(away.size for away in self._away))

    def note_here(self: waiting.InMemory) -> None:
        found = waiting.held_by(self._tasks, self._rows.shared)
        here.append(sum(storage.nbytes() for storage, _ in found))

    monkeypatch.setattr(waiting.InFile, "leave", note)
    monkeypatch.setattr(waiting.InMemory, "leave", note_here)
    for fit in (6, 0):
        monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_, fit=fit: fit)
        quietly(*recipe, model, tmp_path / str(fit), short)
    assert held and not any(left), "all of it is in the file"
    assert max(held) <= sizes[-1].file_bytes(2)
    states = 2 * 64 * sizes[-1].hidden * 4  # of a batch, which it has taken
    assert max(held) <= max(here) <= 2 * sizes[0].waiting_bytes + states
    for path in (tmp_path / "6").iterdir():
        if path.name != "quantkit.json":
            assert path.read_bytes() == (tmp_path / "0" / path.name).read_bytes()


@pytest.mark.parametrize("fit", [6, 2])
def test_memory_from_the_arena_changes_no_byte(
    fit: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 128)
    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: ARITHMETIC[2].values[0])
    monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_: fit)
    lent: list[int] = []
    take = arena.Arena.take
    monkeypatch.setattr(arena.Arena, "take", lambda self, size: lent.append(size) or take(self, size))
    make(tiny_llama, tmp_path / "small")
    before = len(lent)
    monkeypatch.setattr(arena, "SMALLEST_BYTES", 1)
    make(tiny_llama, tmp_path / "all")
    assert len(lent) > 10 * before
    monkeypatch.setattr(arena, "_ARENA", None)
    make(tiny_llama, tmp_path / "none")
    same_but_for_the_manifest(tmp_path / "small", tmp_path / "all")
    same_but_for_the_manifest(tmp_path / "none", tmp_path / "all")


def test_one_scratch_file_serves_all_blocks(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 128)
    monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_: 2)
    made, left = [], []
    create, leave = scratch.ScratchFile.__init__, ScratchRoom.leave

    def note(self: Any, folder: Path, size: int) -> None:
        made.append(size)
        create(self, folder, size)

    def note_left(self: Any, file: Any) -> None:
        left.append(file is not None)
        leave(self, file)

    monkeypatch.setattr(scratch.ScratchFile, "__init__", note)
    monkeypatch.setattr(ScratchRoom, "leave", note_left)
    make(tiny_llama, tmp_path / "out")
    assert len(made) == 1 and left == [True, False]


def test_rows_start_again_where_the_disk_has_no_room(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 128)
    monkeypatch.setattr(pipeline, "arithmetic", lambda *_, **__: ARITHMETIC[1].values[0])
    make(tiny_llama, tmp_path / "whole")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_: 2)
    begun = begun_batches(monkeypatch)
    make(tiny_llama, tmp_path / "full")
    assert begun == [0, *5 * [2, 4], 0, *4 * [2, 4]]
    same_but_for_the_manifest(tmp_path / "whole", tmp_path / "full")


@pytest.mark.parametrize("sequences", [6, 0])
def test_a_run_that_fails_while_rows_are_under_way_leaves_torch_as_it_was(
    sequences: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(BlockSizes, "waiting_sequences", lambda *_: sequences)
    before = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    make(tiny_llama, tmp_path / "whole")
    assert (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")) == before
    called: list[Any] = []
    finish, begin = waiting.InMemory.finish, waiting.Rows.begin

    def note(self: Any, batch: slice, *, take: bool) -> Any:
        called.extend(begin(self, batch, take=take))
        return called[-2:]

    def fail(self: Any) -> None:
        if self._batch.start == 2:
            raise ModelError("cut short")
        finish(self)

    monkeypatch.setattr(waiting.Rows, "begin", note)
    monkeypatch.setattr(waiting.InMemory, "finish", fail)
    with pytest.raises(ModelError, match="cut short"):
        make(tiny_llama, tmp_path / "out", "method.correction=0.5")
    assert called and not any(called), "none waits any more"
    assert not torch.is_inference_mode_enabled()
    assert (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")) == before
