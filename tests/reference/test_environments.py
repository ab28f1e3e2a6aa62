"""Environments of other engines, made offline from two packages of our own that stand for torch and an engine."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quantkit.progress import Progress
from quantkit.reference import environments
from quantkit.reference.engines import Ability, ReferenceEngine
from quantkit.reference.environments import STAMP, EnvironmentFailed, _what_failed, pins_sha256, python_of

QUIET = Progress(quiet=True)


def _wheel(folder: Path, name: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "here = True\n")
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def _engine(pins: Path, text: str, **more: object) -> ReferenceEngine:
    pins.write_text(text)
    given: dict[str, object] = {"name": "fake", "version": "1.0", "abilities": (Ability("gptq", (4,)),)}
    return ReferenceEngine(**(given | {"pins": str(pins)} | more))  # type: ignore[arg-type]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees two wheels and nothing else."""
    for name in ("torch", "fake"):
        _wheel(tmp_path, name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("QUANTKIT_ENGINES", str(tmp_path / "engines"))
    return tmp_path


def test_an_environment_is_made_once_and_remade_when_it_is_not_whole(offline: Path) -> None:
    engine = _engine(
        offline / "pins.txt", "fake==1.0\ntorch==1.0\n", prime="open(__import__('sys').prefix + '/ran', 'w')"
    )
    python = python_of(engine, QUIET)
    folder = offline / "engines" / "fake-1.0"
    assert python == folder / "bin" / "python" and (folder / "ran").exists()
    seen = subprocess.run([python, "-c", "import fake, torch; print(torch.here)"], capture_output=True, text=True)
    assert seen.stdout == "True\n"
    stamp = folder / STAMP
    assert json.loads(stamp.read_text())["pins_sha256"] == pins_sha256(engine)

    (folder / "mine").touch()
    python_of(engine, QUIET)
    assert (folder / "mine").exists(), "a whole environment is used as it is"

    stamp.unlink()  # as after a run that was cut off while installing
    python_of(engine, QUIET)
    assert not (folder / "mine").exists() and stamp.exists(), "a half-made one is made again"


def test_another_list_of_pins_is_another_environment(offline: Path) -> None:
    first = _engine(offline / "a.txt", "fake==1.0\ntorch==1.0\n")
    second = _engine(offline / "b.txt", "torch==1.0\n")
    assert pins_sha256(first) != pins_sha256(second)
    folder = offline / "engines" / "fake-1.0"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / STAMP).write_text(json.dumps({"pins_sha256": pins_sha256(first)}))
    assert environments._finished(folder, pins_sha256(first))
    assert not environments._finished(folder, pins_sha256(second))


def test_a_failed_install_says_why_and_leaves_nothing_that_counts(offline: Path) -> None:
    engine = _engine(offline / "pins.txt", "torch==1.0\nnowhere==3.0\n")
    with pytest.raises(EnvironmentFailed, match="^ERROR: No matching distribution found for nowhere==3.0"):
        python_of(engine, QUIET)
    assert not (offline / "engines" / "fake-1.0" / STAMP).exists()


def test_a_list_of_pins_that_is_not_there_is_said(offline: Path) -> None:
    engine = _engine(offline / "pins.txt", "torch==1.0\n")
    (offline / "pins.txt").unlink()
    with pytest.raises(EnvironmentFailed, match=r"pins\.txt: No such file or directory, expected the engine's pinned"):
        python_of(engine, QUIET)
    assert not (offline / "engines").exists()


def test_an_engine_for_another_python_is_not_installed(offline: Path) -> None:
    engine = _engine(offline / "pins.txt", "torch==1.0\n", python=(4, 5))
    with pytest.raises(EnvironmentFailed, match=r"needs Python 3\.4 to 3\.5, this is 3\.\d+"):
        python_of(engine, QUIET)
    assert not (offline / "engines").exists()


def test_an_engine_without_pins_runs_in_this_environment() -> None:
    engine = ReferenceEngine("fake", "1.0", (Ability("nf4"),))
    assert python_of(engine, QUIET) == Path(sys.executable)


def test_of_several_errors_the_one_that_says_most_is_told() -> None:
    conflict = "ERROR: Cannot install torch==0.0.0 because these package versions have conflicting dependencies."
    printed = f"Collecting torch\n{conflict}\nERROR: ResolutionImpossible: for help visit a manual\n"
    assert _what_failed(printed) == conflict
    assert _what_failed("ERROR: first\nERROR: second\n\nnotice") == "ERROR: second"
    assert _what_failed("only this\n") == "only this"
    assert _what_failed("\n") == ""
