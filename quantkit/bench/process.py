"""The processes of a bench: started one at a time, listened to, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from quantkit.bench.worker import Answer, Job
from quantkit.family import Family
from quantkit.progress import Tracker
from quantkit.validation import in_one_line


class WorkerFailed(Exception):  # noqa: N818  # carries the reason for a missing measurement
    """A worker ended without an answer, and how."""


def run_worker(job: Job, timeout_s: float, tracker: Tracker | None = None) -> Answer:
    """Run a job in a process of its own, which ends with all it started.

    Raises WorkerFailed with the last thing it said when it gives no answer.
    """
    with tempfile.TemporaryDirectory(prefix="job-", dir=job.scratch) as folder:
        files = [Path(folder) / name for name in ("job.json", "out.json", "log.txt")]
        files[0].write_text(job.model_dump_json())
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # what this process imports from
        # numba starts as many threads as there are cores otherwise, and changes torch's number with its own
        threads = {"OMP_NUM_THREADS": str(job.threads), "NUMBA_NUM_THREADS": str(job.threads)}
        family = Family()
        environment = os.environ | threads | {"PYTHONPATH": path} | family.environment
        if job.offline:
            environment["HF_HUB_OFFLINE"] = "1"
        # -P: a folder named like a package where the user stands must not be imported in its stead
        command = [sys.executable, "-P", "-m", "quantkit.bench.worker", str(files[0]), str(files[1])]
        with files[2].open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        assert process.stdout is not None
        reader = threading.Thread(target=_follow, args=(process.stdout, tracker), daemon=True)
        reader.start()
        try:
            family.begin(process.pid)
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise WorkerFailed(f"stopped after {timeout_s:.0f} s without an answer") from error
        finally:
            family.end()
            process.wait()
            reader.join(5)
        if code != 0 or not files[1].is_file():
            raise WorkerFailed(how_it_ended(code, files[2].read_text(errors="replace")))
        try:
            return Answer.model_validate_json(files[1].read_bytes())
        except ValidationError as error:
            raise WorkerFailed(f"its answer cannot be used: {in_one_line(error, Answer)}"[:300]) from error


def _follow(stream: IO[bytes], tracker: Tracker | None) -> None:
    """Pass on what the worker says it is at."""
    for line in stream:
        if tracker is None:
            continue
        try:
            stage = json.loads(line)["stage"]
        except (ValueError, KeyError, TypeError):
            continue
        tracker.advance(0 if stage == "imports" else 1, note=stage)


def how_it_ended(code: int, log: str) -> str:
    """How a process ended, and its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if code < 0:
        try:
            how = f"the process was ended by {signal.Signals(-code).name}"
        except ValueError:
            how = f"the process was ended by signal {-code}"
    else:
        how = f"the process ended with code {code}"
    return f"{how}: {lines[-1][:300]}" if lines else how
