"""The processes of a bench: started one at a time, listened to, ended, and what is left when one gives no answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from quantkit.bench.measurement import Measurement
from quantkit.bench.worker import Answer, Job
from quantkit.progress import Tracker
from quantkit.sections import AccuracyBench, AnyBench, DivergenceBench, MemoryBench, ThroughputBench


class WorkerFailed(Exception):  # noqa: N818  # carries the reason for a missing measurement
    """A worker ended without an answer, and how."""


def run_worker(job: Job, timeout_s: float, tracker: Tracker | None = None) -> Answer:
    """Run a job in a process of its own. Raises WorkerFailed with the last thing it said when it gives no answer."""
    with tempfile.TemporaryDirectory(prefix="job-", dir=job.scratch) as folder:
        files = [Path(folder) / name for name in ("job.json", "out.json", "log.txt")]
        files[0].write_text(job.model_dump_json())
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # what this process imports from
        # numba starts as many threads as there are cores otherwise, and changes torch's number with its own
        threads = {"OMP_NUM_THREADS": str(job.threads), "NUMBA_NUM_THREADS": str(job.threads)}
        environment = os.environ | threads | {"PYTHONPATH": path}
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
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise WorkerFailed(f"stopped after {timeout_s:.0f} s without an answer") from error
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            reader.join(5)
        if code != 0 or not files[1].is_file():
            raise WorkerFailed(how_it_ended(code, files[2].read_text(errors="replace")))
        return Answer.model_validate_json(files[1].read_text())


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


def missing(sections: Sequence[AnyBench], reason: str) -> list[Measurement]:
    """Every measurement that the sections would have given, with the reason why it is not there."""
    wanted: list[tuple[str, str, dict[str, object]]] = []
    for section in sections:
        if isinstance(section, MemoryBench):
            wanted += [(metric, "bytes", {}) for metric in ("artifact", "loaded", "peak_rss", "peak_vram")]
            wanted += [(metric, "bits/weight", {}) for metric in ("bits_per_weight", "bits_per_weight_all")]
        elif isinstance(section, ThroughputBench):
            wanted.append(("load", "s", {}))
            for size in section.batch_sizes:
                settings: dict[str, object] = {"batch_size": size}
                wanted += [(metric, "tok/s", settings) for metric in ("prefill", "decode")]
                wanted.append(("first_token", "s", settings))
        elif isinstance(section, DivergenceBench):
            wanted += [("perplexity", "", {}), ("kl", "nats", {}), ("top1", "fraction", {})]
        elif isinstance(section, AccuracyBench):
            wanted += [(f"accuracy/{task}", "fraction", {}) for task in section.tasks]
    return [
        Measurement(metric=metric, value=None, unit=unit, missing=reason, settings=settings)
        for metric, unit, settings in wanted
    ]
