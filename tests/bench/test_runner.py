"""The bench as a whole: fresh processes, one results file, and reasons wherever there is no number."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from oracles.memory_source import MemorySource, store
from quantkit.bench import process, runner
from quantkit.bench.measurement import DIVERGENCES, Measurement, Results
from quantkit.bench.process import WorkerFailed, run_worker
from quantkit.bench.runner import bench
from quantkit.bench.unmeasured import missing
from quantkit.bench.worker import Answer, Job, work
from quantkit.errors import ModelError, UsageError
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.progress import Progress
from quantkit.sections import AccuracyBench, AnyBench, DivergenceBench, MemoryBench, ThroughputBench

QUIET = Progress(quiet=True)
SECTIONS: tuple[AnyBench, ...] = (
    AccuracyBench(limit=8),
    DivergenceBench(sequences=2, length=32),
    ThroughputBench(prompt_tokens=8, decode_tokens=2, batch_sizes=(1, 2), repetitions=2, rounds=2),
    MemoryBench(),
)
METRICS = {"artifact", "bits_per_weight", "bits_per_weight_all", "loaded", "peak_rss", "peak_vram", "prefill", "decode"}
METRICS |= {"load", "first_token", "token_time", "perplexity", *DIVERGENCES, "accuracy/basics"}


@pytest.fixture
def artifact(tiny_llama: Path, tmp_path: Path) -> Path:
    store(MemorySource(tiny_llama), GGUF(), tmp_path / "q4", GGML(type="q4_0"), torch.float16)
    return tmp_path / "q4"


def _job(path: Path, kind: str, scratch: Path, **more: Any) -> Job:
    given = {"sections": (MemoryBench(),), "device": "cpu", "threads": 1, "tokenizer_folder": str(path)} | more
    return Job.model_validate({"kind": kind, "path": str(path), "scratch": str(scratch), **given})


def test_baseline_and_artifact_are_measured_each_in_a_process_of_its_own(tiny_llama: Path, artifact: Path) -> None:
    results = bench(
        [artifact], baseline=str(tiny_llama), sections=SECTIONS, name="t", device="cpu", progress=QUIET, labels=["Q4"]
    )
    again = Results.model_validate(json.loads(results.model_dump_json()))
    assert again == results
    base, (row,) = results.baseline, results.rows
    assert base.label == "FP32" and results.model == "tiny-llama"
    assert (row.label, row.artifact, row.format, row.method) == ("Q4", "q4", "gguf", "gguf Q4_0")
    assert {found.metric for found in row.measurements} == METRICS
    assert {found.metric for found in base.measurements} == METRICS - set(DIVERGENCES) | {"kl_noise"}
    by_metric = {found.metric: found for found in row.measurements}
    assert by_metric["kl"].value and by_metric["kl"].value > 0
    assert len(row.samples["basics"]) == len(base.samples["basics"]) == 8
    assert [f.settings["batch_size"] for f in base.measurements if f.metric == "decode"] == [1, 2]
    assert all((found.value is None) == bool(found.missing) for found in [*base.measurements, *row.measurements])
    assert results.environment["device"] == "cpu" and results.environment["packages"]["torch"]


def test_a_worker_that_fails_says_how(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="the process ended with code 1: .*no such file or folder"):
        run_worker(_job(tmp_path / "gone", "baseline", tmp_path), 120)


def test_a_worker_that_takes_too_long_is_ended(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="stopped after 0 s without an answer"):
        run_worker(_job(tiny_llama, "baseline", tmp_path), 0.05)


@pytest.mark.parametrize("end", ["a time limit", "an interruption", "no answer"])
def test_what_a_worker_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """In a session of its own, where no signal to the worker's group reaches it."""
    started = tmp_path / "started"
    text = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\n"
    )
    text += {
        "a time limit": "time.sleep(60)",
        "an interruption": f"os.kill({os.getpid()}, 2); time.sleep(60)",
        "no answer": "",
    }[end]
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(text)}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt if end == "an interruption" else WorkerFailed):
            run_worker(_job(tmp_path, "baseline", tmp_path), 5 if end == "a time limit" else 120)
    finally:
        signal.signal(signal.SIGINT, before)
    child = int(started.read_text())
    try:
        for _ in range(100):
            if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.1)
        pytest.fail("it goes on")
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, 9)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"measurements": [], "seconds": {"imports": "few"}}', 'seconds.imports: found "few"'),
        ('{"measurements": [', "found .*Invalid JSON"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wrong: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s' '{text}' > \"$5\"\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(WorkerFailed, match=f"^its answer cannot be used: {wrong}"):
        run_worker(_job(tmp_path, "baseline", tmp_path), 60)


def test_a_signal_is_named() -> None:
    assert process.how_it_ended(-11, "loading\nsomething\n") == "the process was ended by SIGSEGV: something"


def test_a_crash_of_every_process_leaves_rows_of_reasons(
    tiny_llama: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> Answer:
        raise WorkerFailed("the process was ended by SIGKILL")

    monkeypatch.setattr(runner, "run_worker", crash)
    results = bench([artifact], baseline=str(tiny_llama), sections=SECTIONS, name="t", device="cpu", progress=QUIET)
    for row in (results.baseline, *results.rows):
        assert {found.metric for found in row.measurements} >= METRICS - set(DIVERGENCES)
        assert all(found.missing == "the process was ended by SIGKILL" for found in row.measurements)
        assert row.notes == ["the process was ended by SIGKILL"]


def test_an_engine_that_crashes_leaves_quality_of_decoded_weights(
    tiny_llama: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash_once(job: Job, *_: object) -> Answer:
        if job.kind == "artifact" and job.without_engine is None:
            raise WorkerFailed("the process was ended by SIGSEGV")
        return work(job)

    monkeypatch.setattr(runner, "run_worker", crash_once)
    results = bench([artifact], baseline=str(tiny_llama), sections=SECTIONS[1:], name="t", device="cpu", progress=QUIET)
    found = {one.metric: one for one in results.rows[0].measurements}
    assert found["decode"].missing == found["loaded"].missing == "the process was ended by SIGSEGV"
    assert found["kl"].value is not None and found["kl"].engine == "decoded weights"
    assert "SIGSEGV" in results.rows[0].notes[-1]


def test_what_is_wrong_is_said_before_anything_runs(
    tiny_llama: Path, tiny_llama_tied: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Answer:
        raise AssertionError("nothing may run")

    monkeypatch.setattr(runner, "run_worker", never)
    common: dict[str, Any] = {"name": "t", "device": "cpu", "progress": QUIET}
    section = AccuracyBench(data={"basics": str(tmp_path / "gone.jsonl")})
    with pytest.raises(UsageError, match=r"data\.basics: .*no such file"):
        bench([artifact], baseline=str(tiny_llama), sections=(section,), **common)
    with pytest.raises(ModelError, match="no such artifact"):
        bench([tmp_path / "none"], baseline=str(tiny_llama), sections=SECTIONS, **common)
    config = json.loads((tiny_llama / "config.json").read_text()) | {"vocab_size": 999}
    with pytest.raises(ModelError, match="vocab_size is 384, that of the baseline 999"):
        runner._same_model(artifact, {**config, "vocab_size": 384}, config)


def test_texts_are_no_longer_than_the_model_has_positions_for() -> None:
    asked = (DivergenceBench(length=512), DivergenceBench(length=128), MemoryBench())
    assert runner._within(asked, 256, QUIET) == [DivergenceBench(length=256), *asked[1:]]
    assert runner._within(asked, None, QUIET) == list(asked)


def test_every_metric_has_its_place_when_missing() -> None:
    found: list[Measurement] = missing(SECTIONS, "because")
    assert {one.metric for one in found} == METRICS
    assert {one.settings["batch_size"] for one in found if one.metric == "prefill"} == {1, 2}
    assert all(one.value is None and one.missing == "because" for one in found)


def test_models_take_turns_in_further_processes(
    tiny_llama: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[str]]] = []

    def answer(job: Job, *_: object) -> Answer:
        seen.append((job.kind, [section.name for section in job.sections]))
        if len(seen) == 4:
            raise WorkerFailed("the process was ended by SIGKILL")
        speeds = {"load": 1.0, "decode": float(len(seen))}
        return Answer(measurements=[Measurement(metric=key, value=value, unit="s") for key, value in speeds.items()])

    monkeypatch.setattr(runner, "run_worker", answer)
    sections = (ThroughputBench(rounds=3), DivergenceBench())
    results = bench([artifact], baseline=str(tiny_llama), sections=sections, name="t", device="cpu", progress=QUIET)
    once, again = ["throughput", "divergence"], ["throughput"]
    assert seen == [(kind, names) for names in (once, again, again) for kind in ("baseline", "artifact")]
    assert results.baseline.measurements[1].rounds == [1.0, 3.0, 5.0]
    assert results.rows[0].measurements[1].rounds == [2.0, None, 6.0]
    assert results.rows[0].notes == ["round 2: the process was ended by SIGKILL"]


def test_without_an_engine_for_speed_there_are_no_further_processes(
    tiny_llama: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def answer(job: Job, *_: object) -> Answer:
        seen.append(job.kind)
        return Answer(measurements=missing(job.sections, "no engine"))

    monkeypatch.setattr(runner, "run_worker", answer)
    bench([artifact], baseline=str(tiny_llama), sections=SECTIONS, name="t", device="cpu", progress=QUIET)
    assert seen == ["baseline", "artifact"]


def test_only_the_baseline_may_fetch_questions(
    tiny_llama: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []

    def answer(job: Job, *_: object) -> Answer:
        seen.append((job.kind, job.offline))
        return Answer(measurements=[], seconds={section.name: 0.0 for section in job.sections})

    monkeypatch.setattr(runner, "run_worker", answer)
    common: dict[str, Any] = {"baseline": str(tiny_llama), "name": "t", "device": "cpu", "progress": QUIET}
    bench([artifact], sections=(AccuracyBench(),), **common)
    bench([artifact], sections=(MemoryBench(),), **common)
    assert seen == [("baseline", False), ("artifact", True), ("baseline", False), ("artifact", False)]
