from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantkit import memory
from quantkit.errors import UsageError
from quantkit.memory import MemoryLimit, memory_limit, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3GB", 3 * 10**9), ("1.5 gb", 15 * 10**8), ("512MiB", 2**29), ("100000", 100000), (" 7kb ", 7000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "3 apples", "-1GB", "3TBB", "GB"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory: found"):
        memory_limit(text)


def test_room_is_what_the_limit_leaves() -> None:
    cpu = torch.device("cpu")
    assert MemoryLimit(1).room_bytes(cpu) == 0
    assert 10**12 - 10**11 < MemoryLimit(10**12).room_bytes(cpu) < 10**12
    assert memory_limit(None).room_bytes(cpu) > 0


def test_freed_memory_goes_back_once_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    monkeypatch.setattr(memory, "return_freed_memory", lambda: returned.append(True))
    resident = iter([50, 100, *[100] * (memory.SETTLED_AT - 2), 101, 103, 101, 106])
    monkeypatch.setattr(
        "psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(resident)))
    )
    watch, seen = memory.GrowthWatch(), []
    for _ in range(memory.SETTLED_AT + 4):
        watch.look()
        seen.append(len(returned))
    assert seen == [1, *[2] * memory.SETTLED_AT, 3, 3, 4]
