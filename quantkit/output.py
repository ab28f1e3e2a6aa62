"""Where artifacts go: refused before work starts when it would touch what a user had, or does not fit."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import DataError, UsageError


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output that exists. Raises UsageError; with `force` only when `out` is not a folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; expected a folder, or a path that does not exist")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UsageError(
            f"{out}: exists and is not empty",
            hint="give another --out, or --force to replace the artifact in it (other files there are kept)",
        )


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises DataError when the disk that holds `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DataError(
            f"{folder}: needs about {needed_bytes / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free",
            hint="free some space or give --out on another disk",
        )


@contextmanager
def no_space_explained(folder: Path) -> Iterator[None]:
    """Turn a full disk or a failing write below this point into one message."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
            raise
        raise DataError(
            f"{folder}: could not be written: {error.strerror}",
            hint="free some space or give --out on another disk",
        ) from error
