"""The folder in which an artifact is made: its lock, and how the artifact gets its place, ended anywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.manifest import FileRecord, Manifest, write_manifest
from quantkit.place import Place


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


@pytest.mark.parametrize("step", [*range(1, 9)])
@pytest.mark.parametrize("what", ["rename", "rmtree", "fsync"])
def test_a_swap_that_was_ended_anywhere_is_completed_and_keeps_a_users_files(
    what: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    artifact(out, "earlier", "model.safetensors", "config.json")
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
