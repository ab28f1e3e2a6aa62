from __future__ import annotations

import pytest
import torch

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
