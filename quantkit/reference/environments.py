"""The environments of the reference engines: made once from their pinned lists, never taken for good half made."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.manifest import write_atomic
from quantkit.progress import Progress
from quantkit.reference.engines import ReferenceEngine
from quantkit.resources import cache_folder

STAMP = "quantkit-environment.json"
"""Written last: an environment without it, or with another hash in it, was never finished and is made again."""

INSTALL_TIMEOUT_S = 3600.0
PYTHON = Path("bin") / "python"


class EnvironmentFailed(Exception):  # noqa: N818  # carries the reason for a row without figures
    """An engine has no environment, and why."""


def engines_folder() -> Path:
    """Where the environments are: $QUANTKIT_ENGINES, else engines/ in quantkit's cache."""
    own = os.environ.get("QUANTKIT_ENGINES")
    return Path(own).expanduser().absolute() if own else cache_folder() / "engines"


def python_of(engine: ReferenceEngine, progress: Progress) -> Path:
    """The python of an engine's environment, which is made when it is not there: torch first, then the pinned list.

    Raises EnvironmentFailed with the last line of what went wrong.
    """
    if engine.pins is None:
        return Path(sys.executable)
    minor = sys.version_info.minor
    lowest, highest = engine.python
    if not lowest <= minor <= highest:
        raise EnvironmentFailed(f"needs Python 3.{lowest} to 3.{highest}, this is 3.{minor}")
    folder = engines_folder() / f"{engine.name}-{engine.version}"
    try:
        digest = pins_sha256(engine)
    except OSError as error:
        raise EnvironmentFailed(
            f"{error.filename}: {error.strerror}, expected the engine's pinned list: a part of quantkit is missing"
        ) from error
    try:
        with _locked(folder):
            if not _finished(folder, digest):
                _make(engine, folder, digest, progress)
    except OSError as error:
        raise EnvironmentFailed(f"{folder}: {error.strerror or error}") from error
    return folder / PYTHON


def pins_sha256(engine: ReferenceEngine) -> str:
    """What an environment is known by: its pinned list and the Python that it is made with."""
    content = json.dumps([engine.requirements, engine.build, sys.version_info[:3]])
    return hashlib.sha256(content.encode()).hexdigest()


def _finished(folder: Path, digest: str) -> bool:
    try:
        return json.loads((folder / STAMP).read_text())["pins_sha256"] == digest and (folder / PYTHON).exists()
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _make(engine: ReferenceEngine, folder: Path, digest: str, progress: Progress) -> None:
    """Make an environment in place, because one cannot be moved; the stamp comes last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pins = folder / "requirements.txt"
    pins.write_text(engine.requirements)
    pip = [str(folder / PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # torch alone and first: a resolver that meets it among others may take the build for another kind of machine
    first = [line for line in engine.requirements.splitlines() if line.startswith("torch==")]
    isolation = ["--no-build-isolation"] if engine.build else []
    steps: list[Sequence[str]] = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, *first],
        *([[*pip, *_pinned(engine, engine.build)]] if engine.build else []),
        [*pip, *isolation, "-r", str(pins)],
    ]
    with progress.task(f"environment of {engine.name} {engine.version}", len(steps)) as tracker:
        for step in steps:
            _run(step)
            tracker.advance()
        if engine.prime:
            # where this fails, the engine does without in its jobs as well
            with suppress(EnvironmentFailed):
                _run([str(folder / PYTHON), "-c", engine.prime])
    write_atomic(folder / STAMP, json.dumps({"engine": engine.name, "pins_sha256": digest}).encode())


def _pinned(engine: ReferenceEngine, names: Sequence[str]) -> list[str]:
    """The lines of the list for these packages, the bare name where the list does not have it."""
    lines = {line.split("==")[0].lower(): line for line in engine.requirements.splitlines()}
    return [lines.get(name, name) for name in names]


def _run(command: Sequence[str]) -> None:
    # what this process imports from must not be seen by another environment
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            command, env=clean, text=True, errors="replace", capture_output=True, timeout=INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailed(f"installing was stopped after {INSTALL_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise EnvironmentFailed(
            _what_failed(f"{done.stdout}\n{done.stderr}") or f"installing ended with code {done.returncode}"
        )


def _what_failed(printed: str) -> str:
    """The line of pip's output that says most: its last error, but for the one that only points to a manual."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    telling = [line for line in errors if "ResolutionImpossible" not in line] or errors or lines
    return telling[-1][:300] if telling else ""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an environment's place, so that two comparisons do not make it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
