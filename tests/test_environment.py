"""What a result says of the machine it was made on."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import environment

FIRST = "processor\t: 0\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
TOLD = f"{FIRST}\nprocessor\t: 1\nmodel name\t: other\n"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environment, "CPUINFO", str(tmp_path / "cpuinfo"))
    return tmp_path / "cpuinfo"


def test_generations_of_one_name_are_told_apart(told: Path) -> None:
    told.write_text(TOLD.format(26, 2))
    assert environment.cpu_model() == "AMD EPYC (family 26, model 2)"
    told.write_text(TOLD.format(25, 1))
    assert environment.cpu_model() == "AMD EPYC (family 25, model 1)"


@pytest.mark.parametrize("text", ["processor\t: 0\nBogoMIPS\t: 50.00\n", "", None])
def test_where_the_system_tells_no_name_its_architecture_stands(text: str | None, told: Path) -> None:
    if text is not None:
        told.write_text(text)
    assert environment.cpu_model() == (platform.processor() or platform.machine())
    assert environment.environment()["cpu"] == environment.cpu_model()


@pytest.mark.skipif(not Path(environment.STATUS).exists(), reason="a system that tells less")
def test_the_peak_is_the_process_s_own_whatever_started_it() -> None:
    ask = "from quantkit.environment import peak_rss_bytes, rss_bytes; print(rss_bytes(), peak_rss_bytes())"
    large = (
        f"import subprocess, sys; x = b'x' * 250_000_000; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    )
    told = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True)
    now, peak = map(int, told.stdout.split())
    assert 0 < 0.9 * now < peak < 150_000_000


def test_a_process_whose_name_is_no_text_has_a_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_bytes(b"Name:\tf\xc3\nVmHWM:\t    1234 kB\nVmRSS:\t 99 kB\n")
    monkeypatch.setattr(environment, "STATUS", str(status))
    assert environment.peak_rss_bytes() == 1234 * 1024
    monkeypatch.setattr(environment, "STATUS", str(tmp_path / "none"))
    assert environment.peak_rss_bytes() > 10_000_000
