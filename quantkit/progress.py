"""How long work shows itself on stderr: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

LINE_EVERY_S = 5.0
"""Plain lines come no faster than this: a log of a long run stays readable, and a watcher sees that it lives."""


class Tracker:
    """One task under way; `advance` tells how far it is."""

    def __init__(self, title: str, total: int, show: Callable[[Tracker], None]):
        self.title = title
        self.total = total
        self.done = 0
        self.note = ""
        self._show = show

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more steps as done. note: what has just been worked on, such as a layer's name."""
        self.done += n
        self.note = note
        self._show(self)


class Progress:
    """Reports tasks on stderr or a given stream: rich bars on a terminal, lines otherwise, nothing when `quiet`."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.quiet = quiet
        self._stream = stream
        self._bars: Bars | None = None

    @property
    def stream(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream

    def say(self, text: str) -> None:
        """Print one line, above the bars when there are some."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Tracker]:
        """Show a task of `total` steps while the block runs; a task may stand inside another."""
        if self.quiet:
            yield Tracker(title, total, lambda tracker: None)
        elif self.stream.isatty():
            with self._bar(title, total) as tracker:
                yield tracker
        else:
            with self._lines(title, total) as tracker:
                yield tracker

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Tracker]:
        outermost = self._bars is None
        bars = _make_bars(self.stream) if self._bars is None else self._bars
        if outermost:
            self._bars = bars
            bars.start()
        bar = bars.add_task(title, total=total or None, note="")
        started = time.monotonic()

        def show(tracker: Tracker) -> None:
            bars.update(bar, completed=tracker.done, note=tracker.note)

        try:
            yield Tracker(title, total, show)
            bars.update(bar, visible=False)
            bars.console.print(f"{title}: {_seconds(started)}", markup=False, highlight=False)
        finally:
            bars.update(bar, visible=False)
            if outermost:
                self._bars = None
                bars.stop()

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Tracker]:
        started = time.monotonic()
        last = started
        self.say(f"{title} ...")

        def show(tracker: Tracker) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LINE_EVERY_S and tracker.done < total:
                last = now
                note = f" ({tracker.note})" if tracker.note else ""
                self.say(f"{title}: {tracker.done} of {total}, {_seconds(started)}{note}")

        tracker = Tracker(title, total, show)
        try:
            yield tracker
        except BaseException:
            self.say(f"{title}: stopped at {tracker.done} of {total} after {_seconds(started)}")
            raise
        self.say(f"{title}: done in {_seconds(started)}")


def _seconds(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"


def _make_bars(stream: TextIO) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False, style="dim"),
        console=Console(file=stream),
        transient=True,
    )
