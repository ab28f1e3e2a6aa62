"""Progress: lines for logs, bars for terminals, silence when asked, and what a failure leaves on the screen."""

from __future__ import annotations

import io
import sys

import pytest

import quantkit.progress
from quantkit.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_name_start_and_end_with_the_time() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress.task("quantizing", 3) as tracker:
        for _ in range(3):
            tracker.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "quantizing ..."
    assert len(lines) == 2
    assert lines[1].startswith("quantizing: done in ") and lines[1].endswith(" s")


def test_plain_lines_come_no_faster_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 4.9, 5.1, 5.1, 6.0, 6.0])
    monkeypatch.setattr(quantkit.progress.time, "monotonic", lambda: next(clock, 6.0))
    stream = io.StringIO()
    with Progress(stream=stream).task("reading", 9) as tracker:
        for index in range(5):
            tracker.advance(note=f"layer {index}")
    middle = [line for line in stream.getvalue().splitlines() if " of " in line]
    assert len(middle) == 1
    assert middle[0].startswith("reading: ") and "of 9" in middle[0] and "layer" in middle[0]


def test_a_failure_says_how_far_it_came() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError), Progress(stream=stream).task("packing", 4) as tracker:
        tracker.advance(2)
        raise ValueError
    assert "packing: stopped at 2 of 4 after" in stream.getvalue()


def test_quiet_shows_nothing_and_still_counts() -> None:
    stream = io.StringIO()
    progress = Progress(quiet=True, stream=stream)
    progress.say("hello")
    with progress.task("packing", 4) as tracker:
        tracker.advance(3)
    assert stream.getvalue() == ""
    assert tracker.done == 3


def test_a_terminal_gets_bars_and_nested_tasks_share_the_screen() -> None:
    stream = Terminal()
    progress = Progress(stream=stream)
    with progress.task("outer", 2) as outer:
        with progress.task("inner [x]", 2) as inner:
            inner.advance(note="model.layers.0")
        progress.say("between [bold]tasks")
        outer.advance()
    text = stream.getvalue()
    assert "outer" in text and "inner [x]" in text
    assert "between [bold]tasks" in text, "what is said is text, not markup"
    with progress.task("again", 1) as tracker:
        tracker.advance()
    assert "again" in stream.getvalue()


def test_the_default_stream_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say("note")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "note\n"
    assert Progress().stream is sys.stderr
