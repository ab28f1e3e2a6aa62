"""Runs that end early and are gone on with: the artifact is that of a run which nobody disturbed, byte for byte."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY, write_tiny_llama
from fakes.kills import COMMANDS, SMALL, fingerprints
from fakes.runs import quietly
from quantkit import checkpoint, one_block, pipeline
from quantkit.checkpoint import Checkpoints
from quantkit.errors import DataError, ModelError, UsageError
from quantkit.formats import safetensors_shard
from quantkit.jobs import run
from quantkit.manifest import Manifest, read_manifest
from quantkit.model.safetensors_file import SafetensorsFile
from quantkit.progress import Progress

HARNESS = REPOSITORY / "tests" / "fakes" / "kills.py"


class Ended(BaseException):
    """Stands for a kill: nothing is cleaned up behind it but locks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=6)


@pytest.fixture(autouse=True)
def _behind_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FIRST_S", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)


def make(model: Path, out: Path, *settings: str, recipe: str = "gptq-4bit-g64", **options: Any) -> Manifest:
    return quietly(recipe, model, out, [*SMALL, *settings], **options)


def ending_behind(block: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let runs end once a block is written down."""
    original = Checkpoints.after_block

    def after_block(self: Checkpoints, done: int, *rest: Any) -> None:
        original(self, done, *rest)
        if done == block:
            raise Ended

    monkeypatch.setattr(Checkpoints, "after_block", after_block)
    return original


@pytest.fixture
def stopped(model: Path, tmp_path: Path) -> Iterator[Path]:
    """An output whose run was ended behind block 4 of 6."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Ended):
        ending_behind(4, patch)
        make(model, tmp_path / "out")
    yield tmp_path / "out"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are worked on from here on."""
    seen: list[int] = []
    original = pipeline._run_block

    def run_block(states: Any, run: Any, block: Any, *rest: Any, **settings: Any) -> None:
        seen.append(block.index)
        original(states, run, block, *rest, **settings)

    monkeypatch.setattr(pipeline, "_run_block", run_block)
    return seen


def test_killed_at_twenty_random_instants(model: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, str(HARNESS), str(model), str(tmp_path), "20", "5"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 20 and {kill["command"] for kill in kills} == set(COMMANDS)
    assert [kill for kill in kills if not kill["same"]] == []
    assert any(kill["kept"] for kill in kills), "some must have gone on"
    assert [path.name for path in tmp_path.rglob(".*.partial")] == []


def test_five_processes_make_the_same_bytes(model: Path, tmp_path: Path) -> None:
    found = []
    for number in range(5):
        settings = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "2"}
        arguments = [sys.executable, str(HARNESS), str(model), str(tmp_path / str(number))]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=settings)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert len(found[0]) > 3 * len(COMMANDS)
    assert all(other == found[0] for other in found)


def test_only_what_is_missing_is_done(stopped: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    made = make(model, stopped)
    assert seen == [4, 5]
    assert len(made.tensors) == 6 * 7 + 1
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]
    make(model, stopped.parent / "whole")
    assert fingerprints(stopped) == fingerprints(stopped.parent / "whole")


def test_what_depends_on_no_byte_may_change(stopped: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    make(model, stopped, max_memory="1MB")
    assert seen == [4, 5]
    make(model, stopped.parent / "whole")
    assert fingerprints(stopped) == fingerprints(stopped.parent / "whole")


def test_a_changed_recipe_is_refused_and_restart_begins_again(
    stopped: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        make(model, stopped, "method.bits=8")
    assert "recipe.gptq-4bit-g64.method.bits: 4, now 8" in caught.value.message
    assert caught.value.message.count("\n") == 1, "nothing else has changed"
    assert caught.value.hint is not None and "--restart" in caught.value.hint
    seen = counted(monkeypatch)
    make(model, stopped, "method.bits=8", restart=True)
    assert seen == [0, 1, 2, 3, 4, 5]
    make(model, stopped.parent / "whole", "method.bits=8")
    assert fingerprints(stopped) == fingerprints(stopped.parent / "whole")


def test_a_changed_model_is_refused(stopped: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    try:
        with pytest.raises(UsageError, match=r"model\.model\.safetensors: \d+ bytes, changed [\d.]+, now "):
            make(model, stopped)
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_changed_calibration_set_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 200)
    setting = f"calibration.set={text}"
    with monkeypatch.context() as patch, pytest.raises(Ended):
        ending_behind(2, patch)
        make(model, tmp_path / "out", setting)
    text.write_text("Pack my box with five dozen liquor jugs, and then some more. " * 200)
    with pytest.raises(UsageError, match="unfinished work with another calibration: fingerprint: "):
        make(model, tmp_path / "out", setting)
    make(model, tmp_path / "out", setting, restart=True)
    assert (tmp_path / "out" / "quantkit.json").is_file()


def test_files_that_were_lost_are_noticed(stopped: Path, model: Path) -> None:
    partial = stopped.parent / ".out.partial"
    states = max(partial.glob("states-*"), key=lambda path: path.stat().st_mtime_ns)
    for path in (partial / "artifact" / ".model-00001.partial", states):
        content = path.read_bytes()
        for damaged in (None, content[:-400_000] if len(content) > 400_000 else content[: len(content) // 4]):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(DataError, match="does not hold what the journal") as caught:
                make(model, stopped)
            assert caught.value.hint is not None and "--restart" in caught.value.hint
            path.write_bytes(content)
    make(model, stopped)


def test_states_of_another_checkpoint_are_not_taken(stopped: Path, model: Path) -> None:
    """A journal that was damaged may tell of an older checkpoint, whose states have been written over."""
    partial = stopped.parent / ".out.partial"
    newest, other = sorted(partial.glob("states-*"), key=lambda path: -path.stat().st_mtime_ns)
    newest.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="does not hold what the journal"):
        make(model, stopped)


def test_states_are_written_over_those_of_the_last_checkpoint_but_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Checkpoints._write_hidden, []

    def write_hidden(self: Checkpoints, *given: Any) -> None:
        original(self, *given)
        files = (tmp_path / ".out.partial").glob("states-*")
        seen.append({path.name: (path.stat().st_ino, path.read_bytes()) for path in files})

    monkeypatch.setattr(Checkpoints, "_write_hidden", write_hidden)
    make(model, tmp_path / "out")
    assert [len(files) for files in seen] == [1, 2, 2, 2, 2]
    for before, after in pairwise(seen[1:]):
        (kept,) = (name for name in after if after[name] == before[name])
        assert all(after[name][0] == before[name][0] for name in after)
        assert all(len(after[name][1]) == len(after[kept][1]) for name in after)


def test_a_write_that_fails_keeps_what_was_done(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(model, tmp_path / "whole")
    original, calls = safetensors_shard._write, 0

    def write(file: Any, data: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise OSError(errno.EIO, "Input/output error")
        original(file, data)

    with monkeypatch.context() as patch, pytest.raises(DataError) as caught:
        patch.setattr(safetensors_shard, "_write", write)
        make(model, tmp_path / "out")
    assert "cannot be written: Input/output error; kept " in caught.value.message
    assert f"of 6 blocks in {tmp_path}" in caught.value.message
    assert caught.value.hint is not None and "the same command goes on" in caught.value.hint
    make(model, tmp_path / "out")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_journal_that_cannot_be_written_ends_the_run(
    stopped: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.EIO, "Input/output error")
        original(handle)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="Input/output error; kept [45] of 6 blocks"):
        patch.setattr(os, "fsync", fsync)
        make(model, stopped)
    make(model, stopped)
    make(model, stopped.parent / "whole")
    assert fingerprints(stopped) == fingerprints(stopped.parent / "whole")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small file system; a limit on file sizes stands in")
def test_a_file_system_that_fills_up(model: Path, tmp_path: Path) -> None:
    """A disk of 250 kB, made larger once it was full."""
    make(model, tmp_path / "whole")
    library, disk = ctypes.CDLL(None, use_errno=True), tmp_path / "disk"
    disk.mkdir()
    if library.mount(b"none", str(disk).encode(), b"tmpfs", 0, b"size=250k"):
        pytest.skip(f"mounting is not allowed here: {os.strerror(ctypes.get_errno())}")
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(DataError, match="(?i)no space left") as caught,
        ):
            patch.setattr("quantkit.output.check_space", lambda folder, needed: None)
            make(model, disk / "out")
        assert "; kept " in caught.value.message
        remount = 32
        assert library.mount(b"none", str(disk).encode(), b"tmpfs", remount, b"size=4m") == 0
        make(model, disk / "out")
        assert fingerprints(disk / "out") == fingerprints(tmp_path / "whole")
        assert [path.name for path in disk.iterdir()] == ["out"]
    finally:
        library.umount2(str(disk).encode(), 2)


def test_a_bad_model_leaves_nothing(stopped: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Any, name: str, rows: slice | None = None) -> None:
        raise ModelError(f"{name}: damaged")

    with monkeypatch.context() as patch, pytest.raises(ModelError):
        patch.setattr(SafetensorsFile, "read", read)
        make(model, stopped)
    assert list(stopped.parent.iterdir()) == []


def test_force_replaces_only_at_the_end(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make(model, out, "method.bits=8")
    (out / "notes.txt").write_text("mine")
    before = fingerprints(out)
    with monkeypatch.context() as patch, pytest.raises(Ended):
        ending_behind(3, patch)
        make(model, out, force=True)
    assert fingerprints(out) == before
    with pytest.raises(UsageError, match="exists and is not empty"):
        make(model, out)
    make(model, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    make(model, tmp_path / "whole")
    assert fingerprints(out) == fingerprints(tmp_path / "whole")


def test_a_run_into_a_mount_point_goes_on_within_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    for ended in (4, 6):  # the second time when all but the names is done
        with monkeypatch.context() as patch, pytest.raises(Ended):
            ending_behind(ended, patch)
            make(model, out)
    assert [path.name for path in out.iterdir()] == [".out.partial"]
    make(model, tmp_path / "whole")
    renames = 0
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += target.parent == out
        if renames == 3:
            raise Ended
        return original(path, target)

    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(Path, "rename", rename)
        make(model, out)
    assert sum(path.is_file() for path in out.iterdir()) == 2
    monkeypatch.setattr(pipeline, "quantize", None)  # nothing is computed anew
    make(model, out)
    assert fingerprints(out) == fingerprints(tmp_path / "whole")


def test_a_run_that_ended_between_artifact_and_farewell_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoints.publish

    def publish(self: Checkpoints) -> None:
        original(self)
        raise Ended

    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(Checkpoints, "publish", publish)
        make(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    monkeypatch.setattr(pipeline, "quantize", None)
    monkeypatch.setattr(one_block, "quantize_staged", None)
    assert make(model, tmp_path / "out").name == "gptq-4bit-g64"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_work_is_written_down_for_a_small_share_of_the_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which a block takes 10 s and each fsync 1 s."""
    now = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    def fsync(handle: int) -> None:
        nonlocal now
        now += 1

    original, written = Checkpoints.after_block, []

    def after_block(self: Checkpoints, done: int, *rest: Any) -> None:
        nonlocal now
        now += 10
        original(self, done, *rest)
        written.append(self.done)

    monkeypatch.setattr(checkpoint, "time", Clock)
    monkeypatch.setattr(checkpoint, "SHARE", 0.2)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Checkpoints, "after_block", after_block)
    make(model, tmp_path / "out")
    assert written == [1, 1, 1, 4, 4, 4]


def test_a_suite_that_ended_while_it_measured_goes_on_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "schema_version: 1\nname: mine\nmodel: {id: a/b}\n"
        "recipes: [{label: NF4, recipe: nf4}, {label: INT8, recipe: int8}]\nbench: [{name: memory}]\n"
    )

    def bench(paths: list[Path], **settings: Any) -> None:
        assert [read_manifest(path) is not None for path in paths] == [True, True]
        raise Ended

    monkeypatch.setattr("quantkit.bench.runner.bench", bench)
    settings: dict[str, Any] = {"settings": [], "device": "cpu", "force": False, "progress": Progress(quiet=True)}
    for _ in range(2):
        with pytest.raises(Ended):
            run(str(suite), model=str(model), out=tmp_path / "out", **settings)
        monkeypatch.setattr(pipeline, "quantize", None)  # what is made is not made again
