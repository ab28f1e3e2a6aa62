"""The journal of a run: lines that are on disk before the work goes on, each with a checksum."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """The end of a file where entries are appended; `entries` are those that it held when it was opened.

    A line is the CRC-32 of an entry in hex, a space and the entry as JSON. What a kill or a power loss left behind the
    last sound line is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[Entry] = []
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        sound = 0
        for line in self._file.readlines():
            entry = _entry(line)
            if entry is None:
                break
            self.entries.append(entry)
            sound += len(line)
        self._file.truncate(sound)

    def append(self, entry: Entry) -> None:
        """Add an entry; it is on disk when this returns."""
        text = json.dumps(entry, ensure_ascii=False).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        done = 0
        while done < len(line):
            done += self._file.write(line[done:])
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _entry(line: bytes) -> Entry | None:
    """The entry of a line, None when the line is torn or damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None
