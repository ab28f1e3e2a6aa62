"""Scratch files: what was written comes back, and one of them serves one block after another while there is room."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from quantkit.model.scratch import SPARE_BYTES, ScratchFile, ScratchRoom

Usage = namedtuple("Usage", "total used free")


def test_what_was_written_is_read_where_it_was(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path, 4096)
    values = torch.arange(100.0)
    file.write(80, values)
    file.write(0, values[:20].bfloat16())
    found, short = torch.empty(100), torch.empty(20, dtype=torch.bfloat16)
    file.read(80, found)
    file.read(0, short)
    assert torch.equal(found, values) and torch.equal(short.float(), values[:20])


def test_a_file_that_was_left_is_taken_again_where_it_is_large_enough(tmp_path: Path) -> None:
    room = ScratchRoom(tmp_path)
    first = room.take(1000)
    assert first is not None and room.take(1000) is not first, "it is in use"
    room.leave(first)
    assert room.take(900) is first
    room.leave(first)
    larger = room.take(1001)
    assert larger is not None and larger is not first and larger.size == 1001
    room.leave(larger)
    assert room.take(0) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("spare", "again"), [(SPARE_BYTES + 1000, True), (SPARE_BYTES + 999, False)])
def test_it_goes_where_the_disk_has_little_room(
    spare: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = ScratchRoom(tmp_path)
    file = room.take(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, spare))
    room.leave(file)
    assert (room.take(1000) is file) == again
