"""The folder in which an artifact is made: its lock, and how the artifact gets its place, ended anywhere."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit import place as places
from quantkit.errors import UsageError
from quantkit.manifest import FileRecord, Manifest, write_manifest
from quantkit.place import Place, partial_folder, refuse_conflicts

OURS = ("model.safetensors", "config.json", "tokenizer.json")


class Ended(BaseException):
    """Stands for a kill."""


def artifact(folder: Path, content: str, *files: str) -> None:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(content)
    records = [FileRecord(name=name, bytes=len(content), sha256="") for name in files]
    manifest = Manifest.model_construct(
        name=content, created="", quantkit_version="", recipe={}, recipe_sha256="", method="", method_name="",
        format="", source={}, calibration=None, quantize_s=0, peak_rss_bytes=0, tensors=[], bits_per_weight=None,
        bits_per_weight_all=0, files=records, environment={},
    )  # fmt: skip
    write_manifest(manifest, folder)


def ending_at(number: int, original: Callable[..., object]) -> Callable[..., object]:
    """The function, until its `number`th call."""
    calls = 0

    def call(*args: object, **settings: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Ended
        return original(*args, **settings)

    return call


def test_a_second_run_on_an_output_is_refused_and_told_the_process(tmp_path: Path) -> None:
    first, second = Place(tmp_path / "out"), Place(tmp_path / "out")
    first.open()
    with pytest.raises(UsageError, match=rf"is being made by another run, process {os.getpid()}$"):
        second.open()
    first.close()
    second.open()
    second.remove()
    assert list(tmp_path.iterdir()) == []
    first.open()  # where the folder has gone a new one is made


def test_folders_on_the_way_go_with_the_place_unless_something_else_is_in_them(tmp_path: Path) -> None:
    place = Place(tmp_path / "a" / "b" / "out")
    place.open()
    place.remove()
    assert list(tmp_path.iterdir()) == []
    place.open()
    (tmp_path / "a" / "mine").write_text("x")
    place.remove()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]


def stay(out: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder one of a kind that is not renamed."""
    if kind == "current":
        monkeypatch.chdir(out)
    elif kind == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    elif kind == "busy":
        original = Path.rename

        def rename(path: Path, target: Path) -> Path:
            if path == out:
                raise OSError(errno.EBUSY, "Device or resource busy")
            return original(path, target)

        monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("kind", ["renamed", "current", "mount", "busy"])
@pytest.mark.parametrize("step", [*range(1, 13)])
@pytest.mark.parametrize("what", ["rename", "rmtree", "fsync"])
def test_a_swap_that_was_ended_anywhere_is_completed_and_keeps_a_users_files(
    what: str, step: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    artifact(out, "earlier", "model.safetensors", "config.json")
    stay(out, kind, monkeypatch)
    before = out.stat().st_ino
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots" / "a.png").write_text("mine")
    place = Place(out)
    place.open()
    artifact(place.artifact, "new", "model.safetensors", "tokenizer.json")
    with monkeypatch.context() as patch:
        if what == "rename":
            patch.setattr(Path, "rename", ending_at(step, Path.rename))
        elif what == "rmtree":
            patch.setattr(shutil, "rmtree", ending_at(step, shutil.rmtree))
        else:
            patch.setattr(os, "fsync", ending_at(step, os.fsync))
        try:
            place.publish()
        except Ended:
            held = [path.read_text() for path in tmp_path.rglob("notes.txt")]
            assert held == ["mine"], "it is there, or aside"
            found = {path.name: path.read_text() for path in out.glob("*") if path.name in OURS}
            assert len(set(found.values())) <= 1, "files of one artifact alone"
            assert "quantkit.json" not in {path.name for path in out.glob("*")} or len(found) == 2
    place.close()
    again = Place(out)
    again.open()
    again.publish()
    again.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = ["model.safetensors", "notes.txt", "plots", "quantkit.json", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "model.safetensors").read_text() == "new" and (out / "notes.txt").read_text() == "mine"
    assert (out / "plots" / "a.png").read_text() == "mine"
    assert (out.stat().st_ino == before) == (kind != "renamed")


def test_the_first_artifact_of_a_mount_point_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    stay(out, "mount", monkeypatch)
    place = Place(out)
    assert place.folder.parent == out
    place.open()
    artifact(place.artifact, "new", "model.safetensors")
    place.publish()
    place.remove()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "lost+found",
        "model.safetensors",
        "out",
        "quantkit.json",
    ]


def test_the_place_is_in_the_output_where_its_folder_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my out"
    beside, inside = tmp_path / ".my out.partial", out / ".my out.partial"
    assert partial_folder(out) == beside
    out.mkdir()
    assert partial_folder(out) == beside
    mounts = tmp_path / "mountinfo"  # a folder of the same file system, which only this list tells
    mounts.write_bytes(b"29 1 0:1 /x %s rw - ext4 /dev/vda rw\n" % os.fsencode(out).replace(b" ", b"\\040"))
    with monkeypatch.context() as patch:
        patch.setattr(places, "MOUNTS", mounts)
        assert partial_folder(out) == inside
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        assert partial_folder(out) == inside
    assert partial_folder(out) == beside


def test_a_link_stays_and_what_it_points_to_is_made_or_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link"
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(Path("elsewhere") / "out")
    for content in ("first", "second"):
        place = Place(link)
        place.open()
        artifact(place.artifact, content, "model.safetensors")
        place.publish()
        place.remove()
        assert link.is_symlink() and (link / "model.safetensors").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["out"]


def test_all_files_in_the_way_are_named_and_those_of_an_artifact_are_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_conflicts(out, ["config.json"])
    artifact(out, "earlier", "model.safetensors")
    for name in ("config.json", "README.md", "notes.txt"):
        (out / name).write_text("mine")
    with pytest.raises(UsageError) as caught:
        refuse_conflicts(out, ["config.json", "README.md", "model.safetensors", "quantkit.json"])
    named = [line.partition(":")[0] for line in caught.value.message.splitlines()]
    assert named == [str(out / "README.md"), str(out / "config.json")]


def test_a_users_file_in_the_way_is_left_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    place = Place(out)
    place.open()
    artifact(place.artifact, "new", "config.json")
    with pytest.raises(UsageError, match=r"config\.json: is not part of an artifact"):
        place.publish()
    assert (out / "config.json").read_text() == "mine"
    (out / "config.json").unlink()
    place.publish()
    assert (out / "config.json").read_text() == "new"
