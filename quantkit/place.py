"""The hidden folder beside an output in which it is made: `.NAME.partial`, locked while a process works there."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.journal import Journal
from quantkit.manifest import fsync_folder, read_manifest


def partial_folder(out: Path) -> Path:
    """Where the artifact that goes to `out` is made."""
    return out.with_name(f".{out.name}.partial")


class Place:
    """The folder of one output. `artifact` holds what will be the output, `old` what the output was while they swap."""

    def __init__(self, out: Path):
        self.out = out
        self.folder = partial_folder(out)
        self.artifact = self.folder / "artifact"
        self._old = self.folder / "old"
        self._lock = -1
        self.journal: Journal

    def open(self) -> None:
        """Lock the folder, end a swap that was interrupted, read the journal.

        The lock ends with the process, however that ends. Raises UsageError when another process holds it.
        """
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
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
        """Remove the folder; the lock is given back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def publish(self) -> None:
        """Give the artifact its place, once it is complete; can be repeated when it was interrupted anywhere.

        Files of the output that an earlier artifact's manifest does not list stay, so nothing a user had there is lost.
        Raises UsageError when the artifact has files of their names.
        """
        if self.artifact.is_dir():
            if self.out.is_dir() and not self._old.exists():
                self._refuse_conflicts()
                self.out.rename(self._old)
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

    def _refuse_conflicts(self) -> None:
        known = _known_files(self.out)
        for path in sorted(self.out.iterdir()):
            if path.name not in known and (self.artifact / path.name).exists():
                raise UsageError(
                    f"{path}: is not part of an artifact that quantkit made, and the new one has a file of that name",
                    hint="move it away and give the same command again, which then only has to put the artifact there",
                )


def _known_files(folder: Path) -> set[str]:
    """What an artifact's manifest lists, itself included; nothing where there is none."""
    manifest = read_manifest(folder)
    return {record.name for record in manifest.files} | {"quantkit.json"} if manifest else set()
