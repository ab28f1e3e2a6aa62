"""A job's process: what it took, and every way in which it can end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from quantkit.progress import Tracker
from quantkit.reference.process import Done, JobFailed, run_job

TRACKER = Tracker("t", 0, lambda _: None)
ANSWER = "import json, sys; answer = lambda **found: open(sys.argv[2], 'w').write(json.dumps(found))\n"


def _run(folder: Path, script: str, timeout_s: float = 60.0, job: dict[str, object] | None = None) -> Done:
    (folder / "script.py").write_text(ANSWER + script)
    command = [sys.executable, str(folder / "script.py")]
    return run_job(command, job or {}, folder, timeout_s, TRACKER, dict(os.environ))


def test_time_and_memory_count_what_the_process_started(tmp_path: Path) -> None:
    child = "import time; held = bytearray(b'x') * 150_000_000; end = time.process_time() + 0.6\n"
    child += "while time.process_time() < end: pass"
    script = f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    done = _run(tmp_path, script + "answer(quantize_s=0.25, versions={'torch': '2'})")
    assert done.cost.cpu_s > 0.5 and done.cost.wall_s > 0.5
    assert 150e6 < done.cost.peak_rss_bytes < 400e6
    assert (done.cost.quantize_s, done.cost.load_s, done.versions) == (0.25, None, {"torch": "2"})


def test_the_job_arrives_as_it_was_given(tmp_path: Path) -> None:
    script = "job = json.load(open(sys.argv[1])); answer(versions=job)"
    assert _run(tmp_path, script, job={"method": "gptq"}).versions == {"method": "gptq"}


def test_a_crash_is_the_last_line_it_said(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="^the process ended with code 3: out of luck$") as caught:
        _run(tmp_path, "print('starting'); print('out of luck', file=sys.stderr); sys.exit(3)")
    assert caught.value.cost.wall_s > 0


def test_a_bare_assertion_is_told_with_its_line(tmp_path: Path) -> None:
    # on Python 3.11 a line of carets stands between the two
    with pytest.raises(JobFailed, match=r"^the process ended with code 1: AssertionError: assert 288 % 64 == 0$"):
        _run(tmp_path, "assert 288 % 64 == 0")


def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="the process was ended by SIGSEGV"):
        _run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def test_the_workers_own_reason_comes_first(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="^ModuleNotFoundError: No module named 'gone'$"):
        _run(tmp_path, "answer(error=\"ModuleNotFoundError: No module named 'gone'\"); print('noise'); sys.exit(1)")


def test_no_answer_is_a_failure_whatever_the_exit_code(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="the process ended with code 0: all well"):
        _run(tmp_path, "print('all well')")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"quantize_s": "fast"}', 'quantize_s: found "fast", expected a number'),
        ('{"quantize_s": true}', "quantize_s: found true, expected a number"),
        ('{"load_s": NaN, "save_s": -1}', "load_s: found NaN, expected a finite number; save_s: found -1, expected 0"),
        ('{"peak_rss_bytes": "1 GB"}', 'peak_rss_bytes: found "1 GB", expected an integer'),
        ('{"peak_vram_bytes": [1]}', r"peak_vram_bytes: found \[1\], expected an integer"),
        ('{"peak_vram_bytes": 1' + 400 * "0" + "}", "peak_vram_bytes: found 10+..., expected less than"),
        ('{"versions": {"torch": 2}}', "versions.torch: found 2, expected text"),
        ('{"versions": null}', "versions: found null, expected a mapping"),
    ],
)
def test_an_answer_of_another_kind_is_a_failure_with_what_is_wrong(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(JobFailed, match=f"^its answer cannot be used: {reason}") as caught:
        _run(tmp_path, f"open(sys.argv[2], 'w').write({text!r})")
    assert caught.value.cost.wall_s > 0 and caught.value.cost.quantize_s is None


def test_what_is_not_a_figure_does_not_hide_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="^the process ended with code 3: out of luck$"):
        _run(tmp_path, "answer(quantize_s='fast'); print('out of luck'); sys.exit(3)")
    with pytest.raises(JobFailed, match="^no such thing$"):
        _run(tmp_path, "answer(error='no such thing', versions=4); sys.exit(1)")


def test_a_reason_can_be_written_whatever_it_holds(tmp_path: Path) -> None:
    with pytest.raises(JobFailed) as caught:
        _run(tmp_path, r"""open(sys.argv[2], 'w').write('{"error": "half \\ud800"}')""")
    assert str(caught.value) == "half ?"
    done = _run(tmp_path, r"""open(sys.argv[2], 'w').write('{"versions": {"torch": "\\ud800"}}')""")
    assert done.versions == {"torch": "?"}


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_an_answer_that_is_none_is_a_failure(tmp_path: Path, text: str) -> None:
    with pytest.raises(JobFailed, match="^the process ended with code 0: all well$"):
        _run(tmp_path, f"open(sys.argv[2], 'w').write({text!r}); print('all well')")


def test_other_keys_of_an_answer_are_left_alone(tmp_path: Path) -> None:
    assert _run(tmp_path, "answer(quantize_s=1, mood='good')").cost.quantize_s == 1


def test_a_command_that_cannot_be_started_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="python: cannot be started: No such file or directory"):
        run_job([str(tmp_path / "python")], {}, tmp_path, 60.0, TRACKER, dict(os.environ))


@pytest.mark.parametrize("own_session", [False, True])
def test_a_hang_is_ended_with_what_it_started(tmp_path: Path, own_session: bool) -> None:
    script = "import subprocess, time\nsleeper = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
    script += f"child = subprocess.Popen(sleeper, start_new_session={own_session})\n"
    script += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(JobFailed, match="^stopped after 2 s without an answer$"):
        _run(tmp_path, script, timeout_s=2)
    assert time.monotonic() - started < 20
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not _alive(child):
            return
        time.sleep(0.1)
    raise AssertionError("the child of the job outlived it")


def _alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
