"""Ctrl-C and SIGTERM on a run: it ends at once, says what it kept and how to go on, and the same command does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from conftest import write_tiny_llama
from fakes.kills import fingerprints

SETTINGS = ["--set", "calibration.sequences=4", "--set", "calibration.length=32"]

PROGRAM = """
import hashlib, sys, time
from quantkit import checkpoint, cli
original = checkpoint.Checkpoints.after_block

def after_block(self, done, *rest):
    original(self, done, *rest)
    if done == 3:
        print("block 3", file=sys.stderr, flush=True)
        {what}

checkpoint.FIRST_S, checkpoint.SHARE = 0.0, 1e9
checkpoint.Checkpoints.after_block = after_block
cli.main()
"""

DEAF = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)  # a minute without a look at signals'
LISTENING = "time.sleep(60)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=6)


@pytest.mark.parametrize(
    ("number", "what", "code"),
    [(signal.SIGINT, DEAF, 130), (signal.SIGINT, LISTENING, 130), (signal.SIGTERM, DEAF, 143)],
)
def test_a_run_ends_at_once_and_is_gone_on_with(
    number: signal.Signals, what: str, code: int, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", "gptq-4bit-g64", "--model", str(model), "--out", str(out), *SETTINGS, "--json"]
    program = [sys.executable, "-c", PROGRAM.format(what=what), *arguments]
    # a shell starts what runs in its background deaf to Ctrl-C, and so would be what these tests start there
    listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening
    ) as running:
        assert running.stderr is not None and running.stdout is not None
        said = ""
        while "block 3\n" not in said:
            line = running.stderr.readline()
            assert line, f"ended too early: {said}"
            said += line
        started = time.monotonic()
        running.send_signal(number)
        assert running.wait(timeout=30) == code
        took_s = time.monotonic() - started
        said, document = running.stderr.read(), json.loads(running.stdout.read())
    assert took_s < 5, "under a second where nothing else runs; what it does not look up from takes a minute"
    assert f"error: interrupted; kept 3 of 6 blocks in {tmp_path}/.out.partial\n" in said
    assert "hint: the same command goes on from there" in said
    assert document["error"]["kind"] == "Interrupted" and document["error"]["exit_code"] == 130
    done = subprocess.run([sys.executable, "-m", "quantkit", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "going on behind block 3 of 6" in done.stderr, done.stderr
    whole = [*arguments[:5], str(tmp_path / "whole"), *SETTINGS]
    assert subprocess.run([sys.executable, "-m", "quantkit", *whole], capture_output=True, timeout=120).returncode == 0
    assert fingerprints(out) == fingerprints(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_end_calls_what_waits_for_it_and_loses_no_output() -> None:
    program = (
        "import atexit, sys\nfrom quantkit.interrupts import end\n"
        'atexit.register(lambda: print("called"))\nsys.stdout.write("said, ")\nend(6)'
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (6, "said, called\n", "")
