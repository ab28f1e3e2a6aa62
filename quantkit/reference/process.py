"""One job in one fresh process, with all it started counted: seconds, processor time, the most memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quantkit.bench.process import how_it_ended
from quantkit.family import Family
from quantkit.progress import Tracker
from quantkit.reference.results import Cost
from quantkit.validation import in_one_line

SAMPLE_S = 0.05
"""Between two looks at the memory of a running job."""

CHILDREN_S = 0.25
"""Between two looks for children: that goes over all processes of the machine and takes a millisecond, in which one of
the job's threads stands still and the others wait for it. A look at the memory takes a fortieth of it."""


class JobFailed(Exception):  # noqa: N818  # carries the reason for a row without figures
    """A job ended without an answer, and how. cost: what it took until then."""

    def __init__(self, reason: str, cost: Cost):
        super().__init__(reason)
        self.cost = cost


@dataclass(frozen=True)
class Done:
    """What a job took, and what its worker had to say."""

    cost: Cost
    versions: dict[str, str]


def _writable(text: str) -> str:
    """A text without halves of characters: JSON can spell them, but nothing prints or writes them."""
    return text.encode(errors="replace").decode()


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]  # what a system counts memory in
Text = Annotated[str, AfterValidator(_writable)]


class Told(BaseModel):
    """What a worker says of its run, taken as it is or not at all; other keys of its answer are not read."""

    model_config = ConfigDict(frozen=True, strict=True)

    load_s: Seconds | None = None
    quantize_s: Seconds | None = None
    save_s: Seconds | None = None
    peak_rss_bytes: Bytes | None = None
    peak_vram_bytes: Bytes | None = None
    versions: dict[Text, Text] = Field(default_factory=dict)


def run_job(
    command: Sequence[str],
    job: Mapping[str, Any],
    folder: Path,
    timeout_s: float,
    tracker: Tracker,
    environment: Mapping[str, str],
) -> Done:
    """Run `COMMAND job.json answer.json` in an empty folder and wait for it; it and all it started are ended in time.

    Raises JobFailed when it cannot be started, crashes, is ended by a signal or the time limit, leaves no answer, or
    one that says something else than it should.
    """
    job_file, answer_file, log_file = (folder / name for name in ("job.json", "answer.json", "log.txt"))
    job_file.write_text(json.dumps(job))
    family = Family()
    with log_file.open("wb") as log:
        started = time.perf_counter()
        try:
            # a session of its own, so that most of what it starts can be ended with it at once
            process = subprocess.Popen(
                [*command, str(job_file), str(answer_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment, **family.environment},
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            nothing = Cost(wall_s=0.0, cpu_s=0.0, peak_rss_bytes=0)
            raise JobFailed(f"{command[0]}: cannot be started: {error.strerror}", nothing) from error
        try:
            family.begin(process.pid)
            code, usage, sampled = _wait(process.pid, started + timeout_s, family, tracker)
            wall = time.perf_counter() - started
        finally:
            family.end()
    process.returncode = 0 if code is None else code  # it has been waited for: nothing is left to ask the system
    answer = _answer(answer_file)
    told, wrong = _told(answer)
    cost = Cost(
        wall_s=wall,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=max(sampled, told.peak_rss_bytes or 0) or _max_rss(usage),
        peak_vram_bytes=told.peak_vram_bytes,
        load_s=told.load_s,
        quantize_s=told.quantize_s,
        save_s=told.save_s,
    )
    if code is None:
        raise JobFailed(f"stopped after {timeout_s:.0f} s without an answer", cost)
    if code or "error" in answer or not answer:
        reason = answer.get("error") or how_it_ended(code, _legible(log_file.read_text(errors="replace")))
        raise JobFailed(_writable(str(reason)[:300]), cost)
    if wrong:
        raise JobFailed(f"its answer cannot be used: {wrong}"[:300], cost)
    return Done(cost, told.versions)


def _wait(pid: int, deadline: float, family: Family, tracker: Tracker) -> tuple[int | None, Any, int]:
    """Exit code (None past the deadline), resource usage of the process and its children, most bytes seen resident."""
    most = 0
    listed = -CHILDREN_S
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage, most
        now = time.perf_counter()
        if now > deadline:
            family.end()
            _, _, usage = os.wait4(pid, 0)
            return None, usage, most
        if now >= listed + CHILDREN_S:
            family.look()
            listed = now
        most = max(most, family.resident_bytes())
        tracker.advance(0)
        time.sleep(SAMPLE_S)


def _max_rss(usage: Any) -> int:
    """The system's own figure, for a job that was over before the first look.

    Linux counts kilobytes, and starts with the memory of the process that started this one: so it comes last.
    """
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _legible(log: str) -> str:
    """A log whose last line says something: a bare exception's name gets the line of code before it."""
    lines = [line.strip() for line in log.splitlines() if line.strip(" \t^~")]
    if len(lines) > 1 and re.fullmatch(r"[\w.]+(Error|Exception)", lines[-1]):
        lines[-1] = f"{lines[-1]}: {lines[-2]}"
    return "\n".join(lines)


def _answer(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _told(answer: dict[str, Any]) -> tuple[Told, str]:
    """The figures of an answer, and all that is wrong with them: then there are none."""
    try:
        return Told.model_validate(answer), ""
    except ValidationError as error:
        return Told(), in_one_line(error, Told)
