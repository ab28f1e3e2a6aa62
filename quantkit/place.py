"""The hidden folder in which an output is made: `.NAME.partial`, locked while a process works there.

It lies beside the output, or in it where the output's folder cannot be renamed: a mount point, or a folder in one that
may not be written. Files get from it into the output by renames alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.journal import Journal
from quantkit.manifest import MANIFEST_NAME, fsync_folder, read_manifest

MOUNTS = Path("/proc/self/mountinfo")


def partial_folder(out: Path) -> Path:
    """Where the artifact that goes to `out` is made; links are followed."""
    out = out.resolve()
    inside = out.is_dir() and (_is_mount(out) or not os.access(out.parent, os.W_OK | os.X_OK))
    return (out if inside else out.parent) / f".{out.name}.partial"


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted on a resolved folder, another folder of the same file system included."""
    if os.path.ismount(folder):
        return True
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:  # not a Linux system
        return False
    points = (line.split()[4] for line in lines)  # white space in them stands as \040, in octal digits
    return os.fsencode(folder) in (re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), it) for it in points)


class Place:
    """The folder of one output. `artifact` holds what will be the output, `old` what the output was while they swap.

    out: links are followed, so that they stay and what they point to is changed.
    """

    def __init__(self, out: Path):
        self.out = out.resolve()
        self.folder = partial_folder(out)
        self._made: list[Path] = []  # folders on the way that were not there, the deepest first
        self.artifact = self.folder / "artifact"
        self._old = self.folder / "old"
        self._lock = -1
        self.journal: Journal

    def open(self) -> None:
        """Lock the folder, end a swap that was interrupted, read the journal.

        The lock ends with the process, however that ends. Raises UsageError when another process holds it, or when
        there cannot be such a folder.
        """
        path = self.folder / "lock"
        self._made = [parent for parent in self.folder.parents if not parent.exists()]
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
                raise UsageError(
                    f"{self.folder}: cannot be made: {error.strerror}", hint="give another --out"
                ) from error
            try:
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._lock).st_ino == path.stat().st_ino:
                    break
                os.close(self._lock)  # of a folder that its owner has just removed
            except FileNotFoundError:
                continue
            except BlockingIOError as error:
                holder = os.read(self._lock, 20).decode(errors="replace")
                os.close(self._lock)
                self._lock = -1
                raise UsageError(
                    f"{self.out}: is being made by another run, process {holder}",
                    hint="wait until it ends, or give another --out",
                ) from error
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())
        if self._old.is_dir():
            self.publish()
        self.journal = Journal(self.folder / "journal")

    def close(self) -> None:
        """Give the lock back; the folder stays."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def empty(self) -> None:
        """Forget all work in the folder."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        self.journal.close()
        self.journal = Journal(self.folder / "journal")

    def remove(self) -> None:
        """Remove the folder, and what was made on the way to it where nothing else is; the lock is given back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()
        with suppress(OSError):  # something else is there
            for parent in self._made:
                parent.rmdir()

    def publish(self) -> None:
        """Give the artifact its place, once it is complete; can be repeated when it was interrupted anywhere.

        Files of the output that an earlier artifact's manifest does not list stay, so nothing a user had there is lost.
        Raises UsageError when the artifact has files of their names.
        """
        if self.artifact.is_dir():
            if self.out.is_dir():
                self._refuse_conflicts()
                if self._old.exists() or not self._set_aside():
                    self._move_in()
            if self.artifact.is_dir():
                self.artifact.rename(self.out)
                fsync_folder(self.out.parent)
        if self._old.is_dir():
            known = _known_files(self._old)
            for path in sorted(self._old.iterdir()):
                if path.name not in known:
                    path.rename(self.out / path.name)
            fsync_folder(self.out)
            # only now, in one step: from here on nothing in it is wanted, and its manifest is no longer asked
            dropped = self.folder / "dropped"
            shutil.rmtree(dropped, ignore_errors=True)
            self._old.rename(dropped)
            shutil.rmtree(dropped)

    def _set_aside(self) -> bool:
        """Rename the output's folder to `old`, unless it has to stay where it is: whoever stands in the current folder
        would follow it, and a mount point cannot be renamed."""
        if self.out.samefile(os.curdir):
            return False
        try:
            self.out.rename(self._old)
        except OSError:
            return False
        return True

    def _move_in(self) -> None:
        """Give files of the artifact their places one by one, when those of an earlier one are in `old`.

        No file stands beside one of another artifact, and the manifest stands beside all of its own only.
        """
        self._old.mkdir(exist_ok=True)
        known, new = self._known_files(), _known_files(self.artifact)
        if new:  # its manifest goes last
            for path in sorted(self.out.iterdir(), key=_last_files, reverse=True):
                if path.name in known and (path.name not in new or (self.artifact / path.name).exists()):
                    path.rename(self._old / path.name)
            fsync_folder(self.out)
            for path in sorted(self.artifact.iterdir(), key=_last_files):
                path.rename(self.out / path.name)
            fsync_folder(self.out)
        self.artifact.rmdir()

    def _known_files(self) -> set[str]:
        """What the manifest of the earlier artifact lists, wherever it is by now."""
        return _known_files(self._old) or _known_files(self.out)

    def _refuse_conflicts(self) -> None:
        hint = "move it away and give the same command again, which then only has to put the artifact there"
        _refuse_others(self.out, self._known_files(), {path.name for path in self.artifact.iterdir()}, hint)


def refuse_conflicts(out: Path, names: Collection[str]) -> None:
    """Refuse an output with files that have a new artifact's `names` and are of no earlier one. Raises UsageError."""
    if out.is_dir():
        _refuse_others(out, _known_files(out), names, "move it away, or give another --out")


def _refuse_others(out: Path, known: Collection[str], coming: Collection[str], hint: str) -> None:
    found = [path for path in sorted(out.iterdir()) if path.name in coming and path.name not in known]
    if found:
        reason = "is not part of an artifact that quantkit made, and the new one has a file of that name"
        raise UsageError("\n".join(f"{path}: {reason}" for path in found), hint=hint)


def _last_files(path: Path) -> tuple[bool, bool]:
    """Sorts the files without which nobody takes a folder for a model behind the others."""
    return path.name == MANIFEST_NAME, path.name == "config.json"


def _known_files(folder: Path) -> set[str]:
    """What an artifact's manifest lists, itself included; nothing where there is none."""
    manifest = read_manifest(folder)
    return {record.name for record in manifest.files} | {MANIFEST_NAME} if manifest else set()
