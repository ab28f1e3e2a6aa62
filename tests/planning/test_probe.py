"""The speed of the machine: kept in the cache, measured again when asked or on another machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.planning import probe as module
from quantkit.planning.probe import Probe, probe
from quantkit.resources import cache_folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "GEMM_SIDE", 64)
    monkeypatch.setattr(module, "FILE_BYTES", 1 << 20)


def kept() -> dict[str, object]:
    return json.loads((cache_folder() / "probe-cpu.json").read_text())


def test_rates_are_positive_and_kept() -> None:
    found = probe()
    assert min(found.float32_flop_s, found.bfloat16_flop_s, found.read_bytes_s, found.write_bytes_s) > 0
    assert found.device_flop_s is None
    assert Probe.model_validate(kept()) == found
    assert probe() == found  # measured anew, a figure would differ


@pytest.mark.parametrize("change", [{"version": 0}, {"identity": {"cpu": "another"}}])
def test_another_machine_or_version_is_measured_again(change: dict[str, object]) -> None:
    probe()
    path = cache_folder() / "probe-cpu.json"
    path.write_text(json.dumps({**kept(), "float32_flop_s": 1.0, **change}))
    assert probe().float32_flop_s > 1.0


def test_again_measures_in_any_case() -> None:
    probe()
    path = cache_folder() / "probe-cpu.json"
    path.write_text(json.dumps({**kept(), "float32_flop_s": 1.0}))
    assert probe().float32_flop_s == 1.0
    assert probe(again=True).float32_flop_s > 1.0


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert probe().float32_flop_s > 0
