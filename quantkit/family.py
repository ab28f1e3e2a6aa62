"""A job's process and all that it has started, in whatever session: the memory they hold and their end."""

from __future__ import annotations

import os
import secrets
import signal
from contextlib import suppress

import psutil

MARK = "QUANTKIT_JOB"
"""In the environment of a job's process, and so of what it starts: those whose parents have ended are known by it."""

ROUNDS = 20
"""Of stopping before killing. Each meets what the last one's processes started before they stood still, and the second
finds nothing in most cases: where this many are not enough, something refuses to be stopped."""


class Family:
    """The processes of one job. `environment` has to be given to its first process, and `begin` that one's id."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)
        self._first: psutil.Process | None = None
        self._leads = False  # the first one, a process group of its own
        self._known: set[psutil.Process] = set()

    @property
    def environment(self) -> dict[str, str]:
        """By which processes are known to be of this family."""
        return {MARK: self._mark}

    def begin(self, pid: int) -> None:
        """Say which process is the first: a child of this one that nobody has waited for yet."""
        self._first = psutil.Process(pid)
        with suppress(ProcessLookupError):
            self._leads = os.getpgid(pid) == pid
        self._known = {self._first}

    def look(self) -> None:
        """Note who is there by now. Goes over all processes of the machine."""
        self._known = {one for one in self._known | self._below(self._first) if one.is_running()}

    def resident_bytes(self) -> int:
        """What those of the last look hold; what two of them share counts twice."""
        total = 0
        for process in self._known:
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def end(self) -> None:
        """Kill them all; there may be none left.

        Whoever is killed has no children any more, for those are another's then; and whoever runs may start some while
        the others are looked for. So all are stopped first, until no more are found.
        """
        met: set[psutil.Process] = set()
        try:
            for _ in range(ROUNDS):
                fresh = self._everyone() - met
                if not fresh:
                    break
                met |= fresh
                for process in fresh:
                    with suppress(psutil.Error):
                        process.suspend()
        finally:
            if self._first is not None and self._leads:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._first.pid, signal.SIGKILL)
            for process in met | self._known:  # the first one in any case, also when this is interrupted
                with suppress(psutil.Error):
                    process.kill()

    def _everyone(self) -> set[psutil.Process]:
        """Those known, those below them, and those that carry the mark."""
        marked = set()
        for process in psutil.process_iter():
            # others' environments cannot be read, and processes end meanwhile
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark:
                    marked.add(process)
        found = {one for one in self._known | marked if one.is_running()}
        return found.union(*(self._below(one) for one in found))

    @staticmethod
    def _below(process: psutil.Process | None) -> set[psutil.Process]:
        """All that a process has started and that they have, if it is still there."""
        if process is None:
            return set()
        with suppress(psutil.Error):
            return set(process.children(recursive=True))
        return set()
