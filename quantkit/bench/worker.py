"""The process that measures one subject: `python -m quantkit.bench.worker JOB.json OUT.json`.

It says on stdout which metric it is at, one JSON object a line; everything else it prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from quantkit.bench.measurement import Measurement
from quantkit.schema import Frozen
from quantkit.sections import AnyBench

if TYPE_CHECKING:
    from quantkit.bench.subject import Subject


class Job(Frozen):
    """What a worker is to do.

    baseline: its folder or file, for what runs it beside the artifact. without_engine: why the artifact's own engine
    may not be used, None when it may. offline: take the questions of tasks from the cache alone, so that all rows
    answer the same ones and an unreachable hub is waited for once.
    """

    kind: Literal["baseline", "artifact"]
    path: str
    sections: tuple[AnyBench, ...]
    device: str
    threads: int
    scratch: str
    tokenizer_folder: str
    baseline: str | None = None
    without_engine: str | None = None
    offline: bool = False


class Answer(Frozen):
    """What a worker found out."""

    measurements: list[Measurement]
    samples: dict[str, list[float]] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict, description="of each stage")


def work(job: Job) -> Answer:
    """Measure everything that a job asks for, in this process."""
    import torch

    from quantkit.bench import in_order, metric
    from quantkit.bench.run import Run

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    seconds: dict[str, float] = {}
    with _timed(seconds, "imports"):
        subject = _subject(job)
        run = Run(
            subject,
            job.kind == "baseline",
            torch.device(job.device),
            Path(job.scratch),
            Path(job.tokenizer_folder),
            Path(job.baseline or job.path),
        )
        run.prepare()
    found: dict[int, list[Measurement]] = {}
    for position, section in in_order(job.sections):
        with _timed(seconds, section.name):
            found[position] = metric(section.name)(section, run)
    run.close()
    ordered: Sequence[Measurement] = [one for position in sorted(found) for one in found[position]]
    return Answer(measurements=list(ordered), samples=run.samples, notes=subject.notes, seconds=seconds)


def _subject(job: Job) -> Subject:
    from quantkit.bench.subject import Artifact, Baseline
    from quantkit.model.reader import open_source

    if job.kind == "artifact":
        return Artifact(Path(job.path), job.without_engine)
    return Baseline(open_source(job.path))


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    _tell(stage)
    started = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started


def _tell(stage: str) -> None:
    print(json.dumps({"stage": stage}), file=_STAGES or sys.stdout, flush=True)


_STAGES: Any = None


def main(job_file: str, out_file: str) -> None:
    """Read a job, write its answer."""
    global _STAGES
    from quantkit.manifest import write_atomic
    from quantkit.quiet import quiet_libraries, stdout_for_data

    quiet_libraries()
    job = Job.model_validate_json(Path(job_file).read_text())
    _STAGES = os.fdopen(os.dup(1), "w")
    with stdout_for_data():
        answer = work(job)
    write_atomic(Path(out_file), answer.model_dump_json().encode())


if __name__ == "__main__":
    from quantkit.interrupts import end

    main(*sys.argv[1:])
    end(0)
