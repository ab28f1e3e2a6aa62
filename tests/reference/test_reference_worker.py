"""The worker of the reference engines: a script that tells its reasons, whatever environment runs it."""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from quantkit.reference import worker
from quantkit.reference.engines import REFERENCE_ENGINES, WORKER


def _answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, run: object) -> tuple[int, dict[str, object]]:
    monkeypatch.setitem(worker.ENGINES, engine, run)
    job, answer = tmp_path / "job.json", tmp_path / "answer.json"
    job.write_text(json.dumps({"engine": engine, "threads": 1, "ids": None, "versions": ["torch"]}))
    with pytest.raises(SystemExit) as ended:
        worker.main(str(job), str(answer))
    return int(ended.value.code or 0), json.loads(answer.read_text())


def test_it_imports_nothing_of_quantkit() -> None:
    imports = [
        node for node in ast.walk(ast.parse(WORKER.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." * node.level for node in imports if isinstance(node, ast.ImportFrom)]
    assert names and not [name for name in names if name.split(".")[0] in ("quantkit", "")]
    assert set(worker.ENGINES) == set(REFERENCE_ENGINES)


def test_stages_are_timed_and_versions_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: worker.Job, rows: worker.Rows, clock: worker.Clock) -> None:
        with clock("quantize"):
            assert rows == []

    code, answer = _answer(tmp_path, monkeypatch, "fake", run)
    assert code == 0
    assert 0 <= answer["quantize_s"] < 5 and "load_s" not in answer  # type: ignore[operator]
    assert answer["versions"] == {"torch": version("torch")}
    if sys.platform == "linux":
        assert answer["peak_rss_bytes"] > 50e6  # type: ignore[operator]


def test_an_error_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise ValueError("no such\nthing")

    code, answer = _answer(tmp_path, monkeypatch, "fake", run)
    assert (code, answer["error"]) == (1, "ValueError: no such")


def test_an_error_without_words_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise RuntimeError

    _, answer = _answer(tmp_path, monkeypatch, "fake", run)
    assert str(answer["error"]).startswith("RuntimeError: raise RuntimeError (test_reference_worker.py:")
