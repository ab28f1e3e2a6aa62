"""Where artifacts go: refused before work starts when it would touch what a user had, complete or absent at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import DataError, UsageError
from quantkit.manifest import fsync_folder, read_manifest


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
            f"{folder}: could not be written: {error.strerror}; nothing was left behind",
            hint="free some space or give --out on another disk",
        ) from error


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Files of `out` that an earlier artifact's manifest does not list move over, so nothing a user had there is lost.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        fsync_folder(partial)
        _swap(partial, out)
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    manifest = read_manifest(out)
    known = {record.name for record in manifest.files} | {"quantkit.json"} if manifest else set()
    made = {path.name for path in partial.iterdir()}
    for path in sorted(out.iterdir()):
        if path.name not in known and path.name in made:
            raise UsageError(
                f"{path}: is not part of an artifact that quantkit made, and the new one has a file of that name",
                hint="move it away, or give another --out",
            )
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    partial.rename(out)
    for path in sorted(old.iterdir()):
        if path.name not in known:
            path.rename(out / path.name)
    shutil.rmtree(old)
