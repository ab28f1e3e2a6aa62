"""Where artifacts and results go: refused before work starts when it would touch what a user had, or does not fit."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import DataError, UsageError
from quantkit.manifest import partial_path, write_atomic
from quantkit.place import partial_folder

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

RESULTS = re.compile(rb'\{\s*"schema_version"')
"""How every file of results begins, whichever version wrote it."""


def check_folder(out: Path) -> None:
    """Refuse a path at which there can be no folder, or none that an artifact is made in. Raises UsageError."""
    where = out.parent
    try:
        folder = out.resolve()
        existing = _nearest(folder)
        if not folder.name:
            raise UsageError(f"{out}: is the root of the file system", hint="give --out a folder in it")
        if existing == folder and not folder.is_dir():
            raise UsageError(f"{out}: is a file; expected a folder, or a path that does not exist")
        if not existing.is_dir():
            raise UsageError(f"{out}: {existing} is a file; expected a folder", hint="give another --out")
        place = partial_folder(folder)
        if not place.exists():
            where = _nearest(place)
            Path(tempfile.mkdtemp(prefix=".quantkit-", dir=where)).rmdir()
    except (OSError, RuntimeError) as error:  # the latter of links in a circle, until Python 3.13
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return  # how much is needed is said later
        raise _unmade(out, "folder", where, error) from error


def check_file(out: Path, *, force: bool) -> None:
    """Refuse a path at which there can be no file, or at which there is one, unless `force` is set. Raises UsageError.

    A file is made there on trial, or in the nearest folder that exists, and taken away.
    """
    where = out.parent
    try:
        if out.resolve().is_dir():
            raise UsageError(f"{out}: is a folder; expected the name of a file")
        where = _nearest(out.parent.resolve())
        if not where.is_dir():
            raise UsageError(f"{out}: {where} is a file; expected a folder", hint="name another place")
        if out.exists() and not force:
            raise UsageError(f"{out}: exists", hint="name another file, or give --force to replace it")
        if out.exists() and not out.is_file():
            raise UsageError(f"{out}: is a device or a pipe; expected the name of a file")
        trial = where / partial_path(out).name
        trial.touch()
        trial.unlink()
    except (OSError, RuntimeError) as error:
        raise _unmade(out, "file", where, error) from error


def check_results(out: Path, *, force: bool) -> None:
    """Refuse a file for results as `check_file` does, and with `force` one that is there and holds none, even damaged
    ones. Raises UsageError."""
    check_file(out, force=force)
    if out.exists() and out.stat().st_size and not RESULTS.match(_start(out)):
        raise UsageError(
            f"{out}: holds no results of quantkit, so it is not replaced", hint="move it away, or give another --out"
        )


def _start(path: Path) -> bytes:
    """The first bytes of a file, none of one that may not be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(64)
    except OSError:
        return b""


def _unmade(out: Path, what: str, where: Path, error: OSError | RuntimeError) -> UsageError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UsageError(f"{out}: no {what} can be made in {where}: {reason}", hint="name another place")


def check_output(out: Path, *, force: bool) -> None:
    """Refuse a folder with anything but unfinished work in it, unless `force` is set. Raises UsageError."""
    if not force and out.is_dir() and any(path.name != partial_folder(out).name for path in out.iterdir()):
        raise UsageError(
            f"{out}: exists and is not empty",
            hint="give another --out, or --force to replace the artifact in it (other files there are kept)",
        )


def free_bytes(folder: Path) -> int:
    """Of the disk that holds a folder, or will when it is made."""
    return shutil.disk_usage(_nearest(folder.resolve())).free


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises DataError when the disk that holds `folder` has less than `needed_bytes` free."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise DataError(
            f"{folder}: needs about {needed_bytes / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free",
            hint="free some space or give --out on another disk",
        )


def write_results(out: Path, content: bytes) -> None:
    """Write a file that took long to get, with the folders on its way.

    Raises DataError when the place cannot be written any more, and says where else the content is then.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, content)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="quantkit-results-")) / out.name
        kept.write_bytes(content)
        raise DataError(
            f"{out}: could not be written: {error.strerror}; the results are in {kept}",
            hint="move them to a place of yours before that folder is cleared",
        ) from error


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists. path: resolved."""
    return next(found for found in (path, *path.parents) if found.exists())


@contextmanager
def no_space_explained(folder: Path) -> Iterator[None]:
    """Turn a full disk or a failing write below this point into one message."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*NO_SPACE, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
            raise
        raise DataError(
            f"{folder}: could not be written: {error.strerror}",
            hint="free some space or give --out on another disk",
        ) from error
