"""Where artifacts go: refused before work starts when it would touch what a user had, or does not fit."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import DataError, UsageError
from quantkit.place import partial_folder

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


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
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{out}: no folder can be made in {where}: {reason}", hint="give another --out") from error


def check_output(out: Path, *, force: bool) -> None:
    """Refuse a folder with anything but unfinished work in it, unless `force` is set. Raises UsageError."""
    if not force and out.is_dir() and any(path.name != partial_folder(out).name for path in out.iterdir()):
        raise UsageError(
            f"{out}: exists and is not empty",
            hint="give another --out, or --force to replace the artifact in it (other files there are kept)",
        )


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises DataError when the disk that holds `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(_nearest(folder.resolve())).free
    if free < needed_bytes:
        raise DataError(
            f"{folder}: needs about {needed_bytes / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free",
            hint="free some space or give --out on another disk",
        )


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
