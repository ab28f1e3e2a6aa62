"""A block run in stages: which rows wait, which start again, and what is left when a run fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.runs import quietly, same_but_for_the_manifest
from quantkit import one_block
from quantkit.errors import ModelError
from quantkit.memory import MemoryLimit
from quantkit.model import forward, stages


def make(model: Path, out: Path, *settings: str) -> None:
    quietly("gptq-4bit-g64", model, out, ["calibration.sequences=6", "calibration.length=64", *settings])


def begun_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First sequences of the batches that start on their way through a block, as they do."""
    begun: list[int] = []
    begin = stages._Rows.begin

    def note(self: Any, batch: slice) -> Any:
        begun.append(batch.start)
        return begin(self, batch)

    monkeypatch.setattr(stages._Rows, "begin", note)
    return begun


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_as_many_rows_wait_as_there_is_room_for(
    correction: float, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 64)  # each of the six sequences is a batch
    needed = (1 if correction == 0 else 2) * 6 * 64 * (3 * 64 + 128) * 4
    rounding = 8 * 128 * (128 + 64) + (0 if correction == 0 else 20 * 128**2 + 24 * 128 * 64)  # of down_proj, the most
    running = 4 * 128**2 + 4 * 64 * (4 * 64 + 2 * 256)  # a batch, and the largest Gram matrix
    beside = max(rounding, running)
    begun = begun_batches(monkeypatch)
    settings = [f"method.correction={correction}"]
    for waiting, room in ((6, beside + needed), (4, beside + needed * 4 // 6 + 1), (0, beside)):
        monkeypatch.setattr(MemoryLimit, "room_bytes", lambda *_, room=room: room)
        make(tiny_llama, tmp_path / str(waiting), *settings)
        first, second = [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5][waiting:]
        # the first block starts the others for its four groups and for its outputs, the second has none to write
        assert begun == first[:waiting] + 5 * second + first[:waiting] + 4 * second
        begun.clear()
        same_but_for_the_manifest(tmp_path / "6", tmp_path / str(waiting))


@pytest.mark.parametrize(("share", "waiting"), [(1.0, [0, 4]), (0.9, [0]), (0.5, [])])
def test_a_short_last_batch_waits_only_with_all_others(
    share: float, waiting: list[int], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 256)  # four of six sequences, then two
    monkeypatch.setattr(one_block, "waiting_share", lambda *_: share)
    begun = begun_batches(monkeypatch)
    make(tiny_llama, tmp_path / "out")
    again = [start for start in (0, 4) if start not in waiting]
    assert begun == waiting + 5 * again + waiting + 4 * again


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_run_that_fails_while_rows_are_under_way_leaves_torch_as_it_was(
    share: float, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(one_block, "waiting_share", lambda *_: share)
    before = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    make(tiny_llama, tmp_path / "whole")
    assert (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")) == before
    called: list[Any] = []
    finish, begin = stages._Rows.finish, stages._Rows.begin

    def note(self: Any, batch: slice) -> Any:
        called.extend(begin(self, batch))
        return called[-2:]

    def fail(self: Any, batch: slice, tasks: Any) -> None:
        if batch.start == 2:
            raise ModelError("cut short")
        finish(self, batch, tasks)

    monkeypatch.setattr(stages._Rows, "begin", note)
    monkeypatch.setattr(stages._Rows, "finish", fail)
    with pytest.raises(ModelError, match="cut short"):
        make(tiny_llama, tmp_path / "out", "method.correction=0.5")
    assert called and not any(called), "none waits any more"
    assert not torch.is_inference_mode_enabled()
    assert (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")) == before
