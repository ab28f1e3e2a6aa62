from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fakes.runs import quietly
from quantkit import jobs, unfinished
from quantkit.errors import DataError, ModelError, UsageError
from quantkit.manifest import read_manifest
from quantkit.output import check_folder, check_output, check_space
from quantkit.place import partial_folder
from quantkit.progress import Progress


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
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match=f"{name}: is a file; expected a folder"):
            check_folder(tmp_path / name)
    with pytest.raises(UsageError, match=f"{tmp_path / 'file'} is a file; expected a folder"):
        check_folder(tmp_path / "file" / "a" / "b")


@pytest.mark.parametrize(
    ("out", "found"),
    [
        ("/", "is the root of the file system"),
        ("/proc/out", "no folder can be made in /proc"),
        ("loop/out", "no folder can be made in loop"),
        ("a" * 250, "no folder can be made in .: File name too long"),
        ("gone/sub", "no folder can be made in"),
    ],
)
def test_a_path_where_no_folder_can_be_is_refused(
    out: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("/proc/gone")
    with pytest.raises(UsageError, match=f"^{re.escape(out)}: {re.escape(found)}"):
        check_folder(Path(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "loop"]


def test_a_path_where_a_folder_is_or_can_be_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("not/there")
    for out in (".", "..", "empty", "new", "new/a/b", "link", "link/a"):
        check_folder(Path(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_an_output_with_anything_but_unfinished_work_in_it_needs_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    check_output(out, force=False)
    out.mkdir()
    check_output(out, force=False)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    partial_folder(out).mkdir()
    check_output(out, force=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        check_output(out, force=False)
    check_output(out, force=True)


def test_an_artifact_goes_to_the_current_folder_and_to_a_mount_point(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stands in the folder sees the artifact there: it is the same folder as before."""
    here, mount = tmp_path / "here", tmp_path / "mount"
    for folder in (here, mount):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == mount)
    for out, folder in ((Path("."), here), (Path("../here"), here), (mount, mount)):
        before = folder.stat().st_ino
        made = quietly("rtn-4bit-g128", tiny_llama, out, ["method.group_size=64"], force=True)
        (folder / "notes.txt").write_text("mine")
        made = quietly("rtn-4bit-g128", tiny_llama, out, ["method.group_size=64"], force=True)
        assert folder.stat().st_ino == before and read_manifest(folder) == made
        assert (folder / "notes.txt").read_text() == "mine"
    assert Path.cwd() == here
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "mount"]
    names = {record.name for record in made.files} | {"quantkit.json", "notes.txt"}
    assert {path.name for path in mount.iterdir()} == names


def test_a_path_is_looked_at_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        quietly("nf4", tmp_path / "no-model", tmp_path / "file" / "x", [])
    with pytest.raises(UsageError, match="is a file"):
        jobs.run(
            "demo", model="no-model", out=tmp_path / "file", settings=[], device="cpu", force=True,
            progress=Progress(quiet=True),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("rtn-4bit-g128", "quantkit.json"),
        ("rtn-4bit-g128", "README.md"),
        ("rtn-4bit-g128", "config.json"),
        ("rtn-4bit-g128", "tokenizer.json"),
        ("rtn-4bit-g128", "model.safetensors"),
        ("rtn-4bit-g128", "quantize_config.json"),
        ("gguf-q4_0", "tiny-llama-Q4_0.gguf"),
        ("gguf-q4_0", "README.md"),
    ],
)
def test_a_users_file_in_the_way_is_named_before_work_starts(
    recipe: str, name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished.Unfinished, "open", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    settings = ["method.group_size=64"] if recipe.startswith("rtn") else []
    with pytest.raises((UsageError, ModelError), match=rf"{re.escape(name)}: (is not part of|not a manifest)"):
        quietly(recipe, tiny_llama, tmp_path / "out", settings, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", name]
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_suite_without_room_on_the_disk_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    (tmp_path / "suite.yaml").write_text(
        "schema_version: 1\nname: s\nrecipes: [{recipe: nf4}, {recipe: int8}]\nbench: [{name: memory}]\n"
    )
    with pytest.raises(DataError, match="the disk has 0 MB free"):
        jobs.run(
            str(tmp_path / "suite.yaml"), model=str(tiny_llama), out=tmp_path / "out", settings=[], device="cpu",
            force=False, progress=Progress(quiet=True),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]
