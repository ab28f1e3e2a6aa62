"""Throughput and memory: what is timed, how it is summed up, which bytes are counted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.memory_source import MemorySource, store
from quantkit.bench import energy, memory, throughput
from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run, settled_rss
from quantkit.bench.subject import Artifact, Baseline
from quantkit.bench.unmeasured import missing_speeds
from quantkit.engines import Session
from quantkit.environment import peak_rss_bytes, rss_bytes
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.model.reader import open_source
from quantkit.sections import MemoryBench, ThroughputBench

CPU = torch.device("cpu")


class Clocked(Session):
    """A session on a clock of its own: prompts take 2, 4, 8 ... s, a step always a quarter second."""

    engine, dtype = "clocked", "float32"

    def __init__(self) -> None:
        self.details: dict[str, Any] = {"kernels": "none"}
        self.now = 0.0
        self._costs = itertools.count(1)
        self.prompts: list[tuple[int, ...]] = []
        self.rooms: set[int] = set()

    def logits(self, ids: Tensor, last: int | None = None) -> Tensor:
        raise AssertionError("not asked for")

    def prefill(self, ids: Tensor, room: int = 256) -> Tensor:
        self.rooms.add(room)
        self.prompts.append(tuple(ids.shape))
        self.now += 2.0 ** next(self._costs)
        return ids[:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        self.now += 0.25
        return tokens

    def close(self) -> None: ...


def _by(found: list[Measurement]) -> dict[tuple[str, int], Measurement]:
    return {(one.metric, one.settings.get("batch_size", 1)): one for one in found}


def test_rates_are_medians_behind_the_warm_up(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Baseline(open_source(str(tiny_llama))), True, CPU, tmp_path, tiny_llama)
    session = Clocked()
    monkeypatch.setattr(run, "speed", lambda: session)
    run.load_s = 1.5
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: session.now)
    section = ThroughputBench(prompt_tokens=16, decode_tokens=4, batch_sizes=(1, 3), warmup=1, repetitions=3)
    found = _by(throughput.measure(section, run))
    assert session.prompts == [(1, 16)] * 4 + [(3, 16)] * 4
    assert session.rooms == {4}
    assert found["load", 1].value == 1.5 and found["load", 1].unit == "s"
    assert found["first_token", 1].value == 8.0  # of 4, 8 and 16 s; the 2 s of the warm-up are not counted
    assert found["first_token", 1].spread == 6.0
    assert found["prefill", 1].value == 2.0 and found["prefill", 1].samples == 3
    assert found["decode", 1].value == 4.0 and found["decode", 1].spread == 0.0
    assert found["decode", 3].value == 12.0
    settings = found["decode", 3].settings
    assert settings["prompt_tokens"] == 16 and settings["decode_tokens"] == 4 and settings["warmup"] == 1
    assert settings["threads"] == torch.get_num_threads() and settings["kernels"] == "none"


def test_further_prompt_lengths_are_read_and_not_decoded_behind(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Baseline(open_source(str(tiny_llama))), True, CPU, tmp_path, tiny_llama)
    session = Clocked()
    monkeypatch.setattr(run, "speed", lambda: session)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: session.now)
    section = ThroughputBench(prompt_tokens=(16, 64), batch_sizes=(1, 2), decode_tokens=4, warmup=0, repetitions=1)
    found = _by(throughput.measure(section, run))
    assert session.prompts == [(1, 16), (1, 64), (2, 16)]
    assert found["prefill", 1].value == 8.0 and found["first_token", 1].value == 2.0
    assert found["prefill/64", 1].value == 16.0 and found["first_token/64", 1].value == 4.0
    assert found["token_time", 1].value == 0.25
    assert ("decode/64", 1) not in found and ("prefill/64", 2) not in found and ("decode", 2) in found
    assert {one.metric for one in missing_speeds(section, "why")} == {metric for metric, _ in found}


def _packages(folder: Path, **counters: int) -> None:
    for name, value in counters.items():
        (folder / f"intel-rapl:{name}").mkdir(exist_ok=True)
        (folder / f"intel-rapl:{name}" / "name").write_text("package-0" if name.startswith("p") else "core")
        (folder / f"intel-rapl:{name}" / "energy_uj").write_text(str(value))
        (folder / f"intel-rapl:{name}" / "max_energy_range_uj").write_text("1000000")


def test_packages_are_counted_once_and_may_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert not energy.EnergyCounter("cpu").available
    _packages(tmp_path, p0=100_000, p1=900_000, core=5)
    counter = energy.EnergyCounter("cpu")
    assert counter.available and counter.joules() == 0.0
    _packages(tmp_path, p0=350_000, p1=150_000, core=900_000)
    assert counter.joules() == pytest.approx(0.25 + 0.25)
    counter.restart()
    assert counter.joules() == 0.0


def test_energy_is_a_measurement_where_the_machine_counts_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    _packages(tmp_path, p0=0)
    run = Run(Baseline(open_source(str(tiny_llama))), True, CPU, tmp_path, tiny_llama)

    class Heated(Clocked):
        def decode(self, tokens: Tensor) -> Tensor:
            _packages(tmp_path, p0=int((tmp_path / "intel-rapl:p0" / "energy_uj").read_text()) + 3000)
            return super().decode(tokens)

    session = Heated()
    monkeypatch.setattr(run, "speed", lambda: session)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: session.now)
    section = ThroughputBench(prompt_tokens=16, decode_tokens=4, batch_sizes=(3,), warmup=0, repetitions=2)
    found = _by(throughput.measure(section, run))
    assert found["energy", 3].value == pytest.approx(0.001) and found["energy", 3].unit == "J/tok"


def test_an_engine_that_is_absent_leaves_reasons_not_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    store(MemorySource(tiny_llama), GGUF(), tmp_path / "q", GGML(type="q8_0"), torch.float16)
    run = Run(Artifact(tmp_path / "q", "pip install it"), False, CPU, tmp_path, tiny_llama)
    found = throughput.measure(ThroughputBench(), run)
    assert {one.metric for one in found} == {"load", "prefill", "decode", "first_token", "token_time"}
    assert all(one.value is None and one.missing == "pip install it" for one in found)
    kept = {one.metric: one for one in memory.measure(MemoryBench(), run)}
    assert kept["loaded"].missing == kept["peak_rss"].missing == "pip install it"
    assert kept["artifact"].value and kept["bits_per_weight"].value


def test_bits_come_from_the_bytes_in_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    store(MemorySource(tiny_llama), GGUF(), tmp_path / "q", GGML(type="q8_0", embedding_type="f16"), torch.float16)
    run = Run(Artifact(tmp_path / "q", "not used here"), False, CPU, tmp_path, tiny_llama)
    found = {one.metric: one for one in memory.stored(run)}
    size = next((tmp_path / "q").glob("*.gguf")).stat().st_size
    assert found["artifact"].value == size
    assert found["bits_per_weight"].value == 8.5  # 32 codes of 8 bits and a half-precision scale
    assert found["bits_per_weight_all"].value == pytest.approx(8 * size / run.subject.source.parameter_count())


def test_the_baseline_counts_its_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_source(str(tiny_llama))
    run = Run(Baseline(source), True, CPU, tmp_path, tiny_llama)
    run.prepare()
    found = {one.metric: one for one in memory.measure(MemoryBench(), run)}
    assert found["artifact"].value == 4 * source.parameter_count()
    assert found["bits_per_weight"].value == found["bits_per_weight_all"].value == 32.0
    assert found["loaded"].value is not None and found["loaded"].value >= 0
    assert found["peak_rss"].value is not None and found["peak_rss"].value > found["loaded"].value
    assert found["peak_vram"].missing == "no GPU was used"


def test_resident_memory_sees_an_allocation() -> None:
    before = settled_rss()
    held = torch.ones(16_000_000)  # 64 MB
    assert rss_bytes() - before > 50_000_000 and peak_rss_bytes() >= rss_bytes() - 5_000_000
    del held
