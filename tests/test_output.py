from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from quantkit.errors import DataError, UsageError
from quantkit.output import check_output, check_space


def test_too_little_space_is_said_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    check_space(tmp_path / "not" / "there", 4_000_000)
    with pytest.raises(DataError, match="needs about 80 MB, the disk has 5 MB free"):
        check_space(tmp_path / "not" / "there", 80_000_000)


def test_a_disk_that_fills_up_ends_in_one_message_and_nothing_is_left(tiny_llama: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes the write of the weights fail in the middle, as a full disk does."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "from quantkit.cli import execute\n"
        f"sys.exit(execute(['quantize', 'rtn-4bit-g128', '--model', {str(tiny_llama)!r},"
        f" '--out', {str(tmp_path / 'out')!r}, '--set', 'method.group_size=64']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", force=True)
    check_output(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", force=False)
