"""Ctrl-C and SIGTERM: as an exception where Python gets to it soon, else by leaving at once where that is safe.

Python looks at signals between its own steps only: not during a matrix product of seconds, and an exception inside the
callbacks of a library may go astray. What a run has written down survives any end, so it may be left anywhere.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, NoReturn

from quantkit.errors import Interrupted

GRACE_S = 0.3
"""How long an exception may take to get out before the process is left at once."""

_received: int | None = None
_last_words: Callable[[], Interrupted] | None = None


def obey_signals(as_json: bool) -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt, and within `may_be_left` end the process in any case.

    For the process of a command line, once, in its main thread. as_json: how to say it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as the shell sets it for what runs behind
            signal.signal(number, _interrupt)
    Thread(target=_watch, args=(reading, os.dup(1), as_json), daemon=True).start()


def end(code: int) -> NoReturn:
    """End the process without taking the interpreter down, which with torch in it needs a third of a second or more.

    What asked to be called at exit is called, but not after an interruption, which is to end at once. code: 130 for an
    interruption becomes 143 where SIGTERM was received.
    """
    if _received is not None and code == Interrupted.exit_code:
        code = 128 + _received
    else:
        atexit._run_exitfuncs()
    with suppress(OSError):  # whoever read the output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextmanager
def may_be_left(last_words: Callable[[], Interrupted]) -> Iterator[None]:
    """While this lasts the process may be left at once: what it has to keep is on disk. last_words: what to say."""
    global _last_words
    _last_words = last_words
    try:
        yield
    finally:
        _last_words = None


def _interrupt(number: int, frame: Any) -> None:
    global _received
    _received = number
    raise KeyboardInterrupt


def _watch(reading: int, stdout: int, as_json: bool) -> None:
    """Wait for a signal; the system's own handler writes its number, whatever Python is doing."""
    from quantkit.outcome import report_failure

    while number := os.read(reading, 1)[0]:
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        time.sleep(GRACE_S)
        say = _last_words
        if say is None:
            continue
        error = say()
        os.dup2(stdout, 1)  # verbs send what libraries print elsewhere
        sys.stdout = sys.__stdout__
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h\n")  # bars hide the cursor
        report_failure(error, as_json=as_json)
        os._exit(128 + number)
