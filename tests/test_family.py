"""The end of a job's processes: whatever session they are in, whoever started them, whatever they start meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from quantkit.family import Family

SLEEPER = "import time; time.sleep(60)"

FIRST = f"""
import os, subprocess, sys, time
def start(text, **more):
    return subprocess.Popen([sys.executable, "-c", text, sys.argv[1]], start_new_session=True, **more)
SLEEPER = {SLEEPER!r}
"""

BELOW = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {!r}, sys.argv[1]], start_new_session=True)"

CASES = {
    "a session of its own": "start(SLEEPER); time.sleep(60)",
    "another environment too": "start(SLEEPER, env={}); time.sleep(60)",
    "its parent has ended": f"start({BELOW.format(SLEEPER)!r}).wait(); time.sleep(60)",
    "all its parents have ended": f"start({BELOW.format(SLEEPER)!r}).wait()",
    # short-lived ones in between, so that a list of them is old as soon as it is made
    "one after the other": "end = time.monotonic() + 30\nwhile time.monotonic() < end: start('pass'); start(SLEEPER)",
}


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    """An argument by which the processes of a test are known; none outlives it."""
    yield str(tmp_path)
    for process in _named(str(tmp_path)):
        process.kill()


def _named(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if name in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _until(condition: bool, name: str) -> bool:
    """Whether some of a name are there, or none, within ten seconds."""
    for _ in range(100):
        if bool(_named(name)) == condition:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("case", CASES)
def test_nobody_outlives_the_end(case: str, name: str) -> None:
    family = Family()
    script = FIRST + CASES[case]
    environment = {**os.environ, **family.environment}
    with subprocess.Popen(
        [sys.executable, "-c", script, name], start_new_session=True, env=environment, stderr=subprocess.DEVNULL
    ) as first:
        family.begin(first.pid)
        if case == "all its parents have ended":
            first.wait(20)
        else:
            time.sleep(1.0)
        assert _until(True, name)
        family.end()
        assert _until(False, name), [process.cmdline() for process in _named(name)]


def test_who_was_seen_is_ended_without_parents_or_mark(name: str) -> None:
    family = Family()
    script = FIRST + "start(SLEEPER, env={}); sys.stdin.readline()"
    environment = {**os.environ, **family.environment}
    with subprocess.Popen(
        [sys.executable, "-c", script, name], start_new_session=True, env=environment, stdin=subprocess.PIPE
    ) as first:
        family.begin(first.pid)
        for _ in range(100):
            family.look()
            if len(_named(name)) == 2 and family.resident_bytes() > 10e6:
                break
            time.sleep(0.1)
        time.sleep(0.3)
        family.look()
        first.communicate(b"\n", timeout=20)
        assert len(_named(name)) == 1
        family.end()
        assert _until(False, name)


def test_others_are_left_alone(name: str) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER, name]) as other:
        family = Family()
        family.look()
        family.end()
        time.sleep(0.2)
        assert other.poll() is None and family.resident_bytes() == 0
        other.kill()
