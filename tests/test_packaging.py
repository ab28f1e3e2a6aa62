"""What is installed: every dependency pinned in the lock, and a wheel that carries the recipes and calibration sets."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from quantkit import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK_LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!]*")
IN_LOCK = ("dev", "llama-cpp", "compressed-tensors")
"""The extras that the lock covers; gptq is built from source when it is installed, so it stays a choice."""


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    strange = [line for line in lines if not LOCK_LINE.fullmatch(line)]
    assert not strange, f"not a plain pin: {strange}"
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    wanted = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    wanted += [text for extra in IN_LOCK for text in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in wanted]


@pytest.mark.parametrize("wanted", requirements(), ids=lambda wanted: wanted.name)
def test_lock_pins_what_the_project_asks_for(wanted: Requirement) -> None:
    pins = locked()
    assert canonicalize_name(wanted.name) in pins
    assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)])


def test_lock_is_complete() -> None:
    """Whatever a pinned package needs on this machine is pinned too; the CUDA build of torch pins its own libraries."""
    from importlib.metadata import requires

    pins = locked()
    missing = []
    for name in pins:
        try:
            needs = requires(name) or []
        except PackageNotFoundError:  # the lock is for more than what happens to be installed
            continue
        for need in map(Requirement, needs):
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            if canonicalize_name(need.name) not in pins and not re.match("nvidia|cuda|triton", need.name):
                missing.append(f"{name} needs {need}")
    assert not missing


def test_numpy_leaves_room_for_the_gptq_extra() -> None:
    """gptqmodel 7.6.0 takes this numpy and no other; see the head of the lock."""
    assert locked()["numpy"] == "2.2.6"


@pytest.mark.parametrize("name", ["torch", "transformers", "typer", "pydantic"])
def test_versions_are_the_locked_ones(name: str) -> None:
    assert version(name).split("+")[0] == locked()[name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the repository, as `make wheel` does it; nothing is fetched."""
    pytest.importorskip("hatchling", reason="the build backend is not installed: make venv")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_its_data(wheel: Path) -> None:
    assert wheel.name.startswith(f"quantkit_llm-{__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"quantkit_llm-{__version__}.dist-info/entry_points.txt").decode()
    assert "quantkit = quantkit.cli:main" in entry_points
    for folder in ("recipes", "calibration"):
        shipped = {f"quantkit/_data/{folder}/{path.name}" for path in (ROOT / folder).glob("*.*")}
        assert shipped and shipped <= names
    for path in (ROOT / "quantkit").rglob("*"):
        if path.is_file() and path.suffix not in (".pyc", ".nbi", ".nbc"):
            assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.endswith((".nbi", ".nbc", ".pyc"))]
    assert not [name for name in names if name.startswith(("tests/", "recipes/", "calibration/"))]


def test_an_installed_wheel_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = "from quantkit import recipe, shipped; print(shipped.__file__); print(len(recipe.list_recipes()))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, count = done.stdout.split()
    assert where.startswith(str(tmp_path / "site"))
    assert int(count) == len(list((ROOT / "recipes").glob("*.yaml")))
