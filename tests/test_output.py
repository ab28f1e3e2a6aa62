from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fakes.runs import quietly
from quantkit import export as exporting
from quantkit import jobs, unfinished
from quantkit.cli import execute
from quantkit.errors import DataError, ModelError, UsageError
from quantkit.manifest import read_manifest
from quantkit.output import check_file, check_folder, check_output, check_results, check_space, write_results
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


NO_FILES = {
    "file/r.gguf": "{}/file is a file; expected a folder",
    "file/x/r.gguf": "{}/file is a file; expected a folder",
    "/proc/r.gguf": "no file can be made in /proc: No such file or directory",
    "/proc/x/r.gguf": "no file can be made in /proc: No such file or directory",
    "a" * 255 + ".gguf": "no file can be made in .: File name too long",
    "a" * 245 + ".gguf": "no file can be made in {}: File name too long",
    "loop/r.gguf": "no file can be made in loop: Symlink loop",
    "folder.gguf": "is a folder; expected the name of a file",
    "link.gguf": "is a folder; expected the name of a file",
    "old.gguf": "exists",
}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what is in the way of NO_FILES."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "old.gguf").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to("folder.gguf")
    return tmp_path


@pytest.mark.parametrize("out", NO_FILES)
@pytest.mark.parametrize(
    "command",
    [
        ["export", "artifact"],
        ["bench", "artifact", "--baseline", "model", "--out"],
        ["compare", "recipe.yaml", "--out"],
        ["calibration", "build", "pydoc", "--model", "model", "--out"],
    ],
    ids=lambda command: command[0],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(
    command: list[str], out: str, places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "artifact").mkdir()
    monkeypatch.setattr(exporting, "open_artifact", None)
    before = sorted(places.iterdir())
    assert execute([*command, out]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}: {NO_FILES[out].format(places)}") and said.count("error: ") == 1
    assert sorted(places.iterdir()) == before and (places / "old.gguf").read_text() == "mine"


def test_a_file_is_taken_where_there_is_one_to_replace_or_none(places: Path) -> None:
    before = sorted(places.iterdir())
    for out in ("new", "new/a/b", "folder.gguf/../x", "link.gguf/x"):
        check_file(Path(out), force=False)
    check_file(Path("old.gguf"), force=True)
    with pytest.raises(UsageError, match="x/..: is a folder"):
        check_file(Path("x/.."), force=True)
    with pytest.raises(UsageError, match="/dev/null: is a device or a pipe"):
        check_file(Path("/dev/null"), force=True)
    assert sorted(places.iterdir()) == before and (places / "old.gguf").read_text() == "mine"


def test_only_results_are_replaced_by_results(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    for content, taken in (("", True), ('{\n  "schema_version": 0, "dam', True), ("mine", False), ('{"a": 1}', False)):
        out.write_text(content)
        with pytest.raises(UsageError, match="exists"):
            check_results(out, force=False)
        if taken:
            check_results(out, force=True)
        else:
            with pytest.raises(UsageError, match="holds no results of quantkit, so it is not replaced"):
                check_results(out, force=True)
        assert out.read_text() == content


@pytest.mark.parametrize("command", [["bench", "artifact", "--baseline", "model"], ["compare", "recipe.yaml"]])
def test_a_users_file_is_not_replaced_by_results(
    command: list[str], places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "artifact").mkdir()
    assert execute([*command, "--out", "old.gguf", "--force"]) == 2
    assert "old.gguf: holds no results of quantkit, so it is not replaced" in capsys.readouterr().err


def test_results_that_cannot_be_written_any_more_are_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_results(tmp_path / "new" / "a" / "r.json", b"figures")
    assert (tmp_path / "new" / "a" / "r.json").read_bytes() == b"figures"
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DataError, match=r"file/r\.json: could not be written: File exists; the results are in"
    ) as caught:
        write_results(tmp_path / "file" / "r.json", b"figures")
    assert Path(caught.value.message.split()[-1]).read_bytes() == b"figures"


def test_a_run_looks_at_the_place_of_its_results_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"results\.json: is a folder"):
        jobs.run(
            "demo", model="no-model", out=tmp_path / "out", settings=[], device="cpu", force=True,
            progress=Progress(quiet=True),
        )  # fmt: skip
