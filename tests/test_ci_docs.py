"""docs/ci.md as a CI takes it: its files are written, its commands run, on a tiny model and a hub on the loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from fakes.hub_uploads import UploadHub

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ci.md"


def marked(mark: str) -> str:
    """The fenced block behind a mark of the page."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found, mark
    return found[1]


def steps() -> list[dict[str, Any]]:
    """The steps of the workflow that run a command; what is to be installed is there already."""
    (job,) = yaml.safe_load(marked("workflow"))["jobs"].values()
    return [step for step in job["steps"] if "run" in step and step["name"] != "Install"]


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A checkout with the file of the page in it, and the command as an installed package would have it."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "ci.yaml").write_text(marked("file: ci.yaml"))
    command = tmp_path / "bin" / "quantkit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m quantkit "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(build: Path, script: str, model: Path, hub: UploadHub) -> subprocess.CompletedProcess[str]:
    """A script as a CI runs it: MODEL, REPO and the token are all that it is told."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "PROXY" not in key.upper()}
    environment = {
        **ours,
        "PATH": f"{build / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODEL": str(model),
        "REPO": "acme/tiny",
        "HF_TOKEN": "hf_ci",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(build / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "GITHUB_STEP_SUMMARY": str(build / "summary.md"),
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=build / "checkout", env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_workflow_and_the_shell_recipe_run(build: Path, tiny_llama: Path) -> None:
    out = build / "checkout" / "out"
    with UploadHub({}, writers={"hf_ci": ("acme",)}) as hub:
        for step in steps():
            done = run(build, step["run"], tiny_llama, hub)
            assert done.returncode == 0, (step["name"], done.stderr)
        assert "| gptq | KL to baseline" in (build / "summary.md").read_text()
        gates = ElementTree.parse(out / "gates.xml").getroot()[0]
        assert (gates.get("tests"), gates.get("failures")) == ("2", "0")
        published = dict(hub.repositories["acme/tiny"].files)
        assert b"| gptq |" in published["README.md"] and "model.safetensors" in published
        done = run(build, marked("shell"), tiny_llama, hub)
        assert done.returncode == 0, done.stderr
        assert (build / "checkout" / "last" / "results.json").read_bytes() == (out / "results.json").read_bytes()
        assert hub.repositories["acme/tiny"].files["model.safetensors"] == published["model.safetensors"]
        done = run(build, "quantkit diff last/results.json out/results.json --fail-on-worse", tiny_llama, hub)
        assert done.returncode == 0 and "the very same" in done.stdout
        strict = "quantkit gate out/results.json --max-bytes 1KB"
        assert run(build, strict, tiny_llama, hub).returncode == 5


def test_the_projects_own_workflow_calls_the_command_of_the_readme() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ["make test"]
    assert re.search(r"^make test ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)


def test_every_suite_and_workflow_of_the_page_is_valid(build: Path) -> None:
    from quantkit.recipe import validate_file

    assert validate_file(build / "checkout" / "ci.yaml") == []
    assert [step["name"] for step in steps()][-1] == "Publish"
