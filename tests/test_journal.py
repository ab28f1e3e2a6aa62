from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.journal import Journal

ENTRIES = [{"run": {"größe": 1}}, {"done": 3, "jobs": ["a\nb"]}, {"finished": True}]


def written(path: Path) -> bytes:
    journal = Journal(path)
    for entry in ENTRIES:
        journal.append(entry)
    journal.close()
    return path.read_bytes()


def test_what_was_appended_is_there_when_opened_again(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    assert Journal(tmp_path / "journal").entries == ENTRIES


def test_a_torn_line_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = written(path)
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content)):
        path.write_bytes(content[:length])
        journal = Journal(path)
        assert journal.entries == ENTRIES[: sum(end <= length for end in ends)]
        journal.append({"more": length})
        journal.close()
        assert Journal(path).entries[-1] == {"more": length}


@pytest.mark.parametrize("where", [0, 3, 9, 12])
def test_a_flipped_bit_ends_what_is_believed(where: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = bytearray(written(path))
    start = content.index(b"\n") + 1
    content[start + where] ^= 4
    path.write_bytes(content)
    assert Journal(path).entries == ENTRIES[:1]
