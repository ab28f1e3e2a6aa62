"""The command line: exit codes, one JSON document on stdout, messages on stderr, help without heavy imports."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import cli, jobs
from quantkit.errors import (
    DataError,
    GateError,
    MissingDependencyError,
    ModelError,
    QuantkitError,
    RecipeError,
    UsageError,
    VerificationError,
)

VERBS = ("quantize", "bench", "run", "report", "advise", "gate", "diff", "card", "push")
VERBS += ("recipes", "calibration", "inspect", "export", "doctor")
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "bitsandbytes", "numpy", "yaml", "numba", "gguf")

Captured = pytest.CaptureFixture[str]


def quantkit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantkit", *arguments]
    settings = {**os.environ, "QUANTKIT_DEBUG": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)


def raising(error: BaseException) -> Any:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    return fail


# help


def test_help_names_every_verb_and_the_exit_codes() -> None:
    done = quantkit("--help")
    assert done.returncode == 0 and done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line.startswith("  ")]
    assert set(listed) >= set(VERBS)
    words = " ".join(done.stdout.split())
    assert "0 done, 2 usage or recipe, 3 model or data, 4 a missing engine or dependency, 5 a gate failed" in words
    assert "6 verification failed, 130 interrupted" in words


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"], ["recipes", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, json; from quantkit.cli import execute; code = execute(sys.argv[1:]);"
        "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0 and done.stdout
    assert [name for name in HEAVY if name in modules] == []
    assert "quantkit.cli" in modules


def test_modules_that_quantize_import_no_scipy_themselves() -> None:
    """A tenth of a second and 17 MB, for intervals in reports; transformers' models and numba have reasons of their
    own."""
    program = "import sys, quantkit.cli, quantkit.jobs, quantkit.pipeline; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: Captured) -> None:
    assert cli.execute([verb, "--help"]) == 0
    assert f"Usage: quantkit {verb}" in capsys.readouterr().out


def test_the_contracts_options_are_there(capsys: Captured) -> None:
    contract = {
        "quantize": ["--model", "--out", "--set", "--device", "--force", "--restart", "--json"],
        "bench": ["--baseline", "--recipe", "--out", "--json"],
        "run": ["--model", "--out", "--set", "--restart", "--json"],
        "report": ["--out"],
        "inspect": ["--json"],
        "doctor": ["--json"],
    }
    for verb, options in contract.items():
        assert cli.execute([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert [option for option in options if option not in text] == []
    for group, names in {"recipes": "list show validate schema", "calibration": "list show build"}.items():
        assert cli.execute([group, "--help"]) == 0
        text = capsys.readouterr().out
        assert [name for name in names.split() if f"\n  {name} " not in text] == []


# usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["quantize"], "Missing argument 'RECIPE'"),
        (["quantize", "nf4", "--nope"], "No such option"),
        (["quantize", "nf4", "--device", "tpu"], "--device"),
        (["bench", "artifact"], "--baseline"),
        (["report"], "no results file"),
        (["advise"], "--memory"),
        (["calibration", "build", "pydoc", "--out", "x", "--model", "y", "--sequences", "0"], "--sequences"),
    ],
)
def test_wrong_usage_exits_2_with_one_message_and_a_hint(arguments: list[str], message: str, capsys: Captured) -> None:
    assert cli.execute(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert "\nhint: `quantkit" in captured.err


@pytest.mark.parametrize("verb", ["quantize", "run"])
@pytest.mark.parametrize(("out", "message"), [("", "--out: is empty"), ("/", "/: is the root of the file system")])
def test_an_out_that_is_no_folder_exits_2(verb: str, out: str, message: str, capsys: Captured) -> None:
    assert cli.execute([verb, "nf4" if verb == "quantize" else "demo", "--model", "no-model", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and "\nhint: " in said


@pytest.mark.parametrize("arguments", [[], ["recipes"], ["calibration"]])
def test_without_a_command_the_help_is_shown_and_the_exit_code_is_usage(arguments: list[str], capsys: Captured) -> None:
    assert cli.execute(arguments) == 2
    captured = capsys.readouterr()
    assert "Commands:" in captured.out + captured.err
    assert "error:" not in captured.err


# errors become messages


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("m"), 2),
        (RecipeError("m"), 2),
        (ModelError("m"), 3),
        (DataError("m"), 3),
        (MissingDependencyError("m"), 4),
        (GateError("m"), 5),
        (VerificationError("m"), 6),
    ],
)
def test_exit_codes(error: QuantkitError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    error.hint = "do this"
    monkeypatch.setattr(jobs, "quantize", raising(error))
    assert cli.execute(["quantize", "nf4"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "error: m\nhint: do this\n"
    assert cli.execute(["quantize", "nf4", "--json"]) == code
    captured = capsys.readouterr()
    said = {"kind": type(error).__name__, "message": "m", "hint": "do this", "exit_code": code}
    assert json.loads(captured.out) == {"error": said}


def test_an_interruption_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(jobs, "quantize", raising(KeyboardInterrupt()))
    assert cli.execute(["quantize", "nf4", "--json"]) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == 130
    assert captured.err == "error: interrupted\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_exits_3(number: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(jobs, "run", raising(OSError(number, os.strerror(number), "out/model.safetensors")))
    assert cli.execute(["run", "demo"]) == 3
    assert "out/model.safetensors: no space left on the device\nhint: free some space" in capsys.readouterr().err


def test_a_bug_is_called_a_bug_and_the_traceback_waits_to_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.delenv("QUANTKIT_DEBUG", raising=False)
    monkeypatch.setattr(jobs, "quantize", raising(ZeroDivisionError("by zero")))
    assert cli.execute(["quantize", "nf4"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == "error: a bug in quantkit: ZeroDivisionError: by zero"
    assert "QUANTKIT_DEBUG=1" in captured.err and "Traceback" not in captured.err
    monkeypatch.setenv("QUANTKIT_DEBUG", "1")
    assert cli.execute(["quantize", "nf4"]) == 1
    assert "Traceback" in capsys.readouterr().err


# what the verbs pass on


class Made:
    def model_dump(self, mode: str) -> dict[str, object]:
        return {"mode": mode}


def test_quantize_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    seen: dict[str, Any] = {}

    def record(recipe: str, **settings: Any) -> Made:
        seen.update(settings, recipe=recipe)
        print("a library prints")
        os.write(1, b"a child process prints\n")
        return Made()

    monkeypatch.setattr(jobs, "quantize", record)
    monkeypatch.setattr("quantkit.words.manifest", lambda made: "made")
    arguments = ["quantize", "own.yaml", "--model", "m.gguf", "--out", "o", "--set", "a.b=1", "--set", "c=2"]
    arguments += ["--device", "cpu", "--max-memory", "3GB", "--trust-remote-code", "--force", "--restart", "--json"]
    assert cli.execute(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"mode": "json"}
    assert "a library prints" in captured.err
    del seen["progress"]
    assert seen == {
        "recipe": "own.yaml",
        "model": "m.gguf",
        "out": Path("o"),
        "settings": ["a.b=1", "c=2"],
        "device": "cpu",
        "max_memory": "3GB",
        "trust_remote_code": True,
        "force": True,
        "restart": True,
    }
    assert cli.execute(["quantize", "own.yaml"]) == 0
    assert capsys.readouterr().out == "made\n"


def test_what_a_verb_writes_to_the_descriptor_goes_to_stderr(capfd: Captured) -> None:
    from quantkit.quiet import stdout_for_data

    with stdout_for_data():
        os.write(1, b"noise\n")
        print("more noise")
    os.write(1, b"data\n")
    captured = capfd.readouterr()
    assert captured.out == "data\n"
    assert "noise\n" in captured.err and "more noise" in captured.err


# whole processes


def test_recipes_in_a_process_of_their_own(tmp_path: Path) -> None:
    listed = quantkit("recipes", "list")
    assert listed.returncode == 0 and listed.stdout.splitlines()[0].startswith("awq-4bit-g128")
    shown = quantkit("recipes", "show", "gptq-4bit-g64")
    assert "\n  group_size: 64\n" in shown.stdout
    schema = quantkit("recipes", "schema")
    assert json.loads(schema.stdout)["$schema"].endswith("schema")
    own = tmp_path / "own.yaml"
    own.write_text(shown.stdout)
    assert quantkit("recipes", "validate", str(own)).stdout == f"{own}: valid\n"


def test_all_files_are_validated_before_the_answer(tmp_path: Path) -> None:
    bad, worse = tmp_path / "bad.yaml", tmp_path / "worse.yaml"
    bad.write_text("{method: {name: gptq, bits: 5}, skipp: []}")
    worse.write_text("method: [")
    done = quantkit("recipes", "validate", str(bad), "gptq-8bit", str(worse))
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == f"error: {bad}: method.bits: found 5, expected 2, 3, 4 or 8"
    assert lines[1] == f"{bad}: skipp: unknown key; did you mean skip?"
    assert lines[2].startswith(f"{worse}: line 1")
    assert lines[3].startswith("hint: ") and len(lines) == 4


def test_bad_recipes_and_models_answer_in_json_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quantkit("quantize", "gptq-8bit", "--set", "method.bits=5", "--out", str(out), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"] == "--set method.bits: found 5, expected 2, 3, 4 or 8"
    done = quantkit("inspect", str(tmp_path / "nowhere"), "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["error"]["kind"] == "ModelError"
    assert not out.exists()


def test_results_are_not_overwritten_unasked(tmp_path: Path) -> None:
    artifact, out = tmp_path / "artifact", tmp_path / "results.json"
    artifact.mkdir()
    out.write_text("mine")
    done = quantkit("bench", str(artifact), "--baseline", "m", "--out", str(out))
    assert done.returncode == 2 and f"{out}: exists" in done.stderr
    assert out.read_text() == "mine"
    done = quantkit("bench", str(tmp_path / "a"), str(tmp_path / "b"), "--baseline", "m")
    assert done.returncode == 3
    assert done.stderr.count("no such artifact") == 2, "all at once"


def test_a_reader_that_has_enough_is_no_error() -> None:
    program = f"{sys.executable} -m quantkit recipes schema | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True, timeout=60)
    assert done.stdout == '{\n  "$sche' and done.stderr == ""


def test_calibration_sets_are_listed_and_shown(capsys: Captured) -> None:
    assert cli.execute(["calibration", "list"]) == 0
    listed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert "pydoc" in listed and all(description.strip() for description in listed.values())
    assert cli.execute(["calibration", "show", "pydoc"]) == 0
    assert "embedded: pydoc_data.topics" in capsys.readouterr().out
    assert cli.execute(["calibration", "show", "pidoc"]) == 3
    assert "did you mean pydoc?" in capsys.readouterr().err


def test_token_ids_are_written_once_with_their_fingerprint(tiny_llama: Path, tmp_path: Path, capsys: Captured) -> None:
    from quantkit.model.calibration import fingerprint_of

    out = tmp_path / "new" / "ids.json"
    arguments = ["calibration", "build", "pydoc", "--out", str(out), "--model", str(tiny_llama)]
    arguments += ["--sequences", "3", "--length", "16", "--seed", "5"]
    assert cli.execute(arguments) == 0
    fingerprint = capsys.readouterr().out.strip()
    document = json.loads(out.read_text())
    assert document["fingerprint"] == fingerprint and len(fingerprint) == 64
    assert [len(row) for row in document["ids"]] == [16, 16, 16]
    assert document["section"] == {"set": "pydoc", "sequences": 3, "length": 16, "seed": 5}
    assert fingerprint_of(torch.tensor(document["ids"])) == fingerprint
    assert cli.execute(arguments) == 2
    assert f"{out}: exists" in capsys.readouterr().err
    assert cli.execute([*arguments, "--force", "--sequences", "100000"]) == 3
    assert "too little text" in capsys.readouterr().err
    assert json.loads(out.read_text()) == document
