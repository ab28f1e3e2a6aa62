"""What is set for the libraries' sake, and given back."""

from __future__ import annotations

import gc
import sys
import weakref
from importlib import import_module
from pathlib import Path

import pytest

from quantkit.quiet import collect_all, collecting_only_new, loading_modules


def test_collection_passes_over_what_was_there_and_comes_back_to_it() -> None:
    with collecting_only_new():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError), collecting_only_new():
        raise ValueError
    assert gc.get_freeze_count() == 0


def test_what_someone_else_set_aside_stays_so() -> None:
    gc.freeze()
    try:
        with collecting_only_new():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with many objects, not imported yet."""
    (tmp_path / "many_objects.py").write_text("MADE = [[] for _ in range(5000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "many_objects", raising=False)
    return "many_objects"


def test_modules_loaded_during_a_run_are_passed_over_as_well(module: str) -> None:
    with collecting_only_new():
        before = gc.get_freeze_count()
        with loading_modules():
            assert not gc.isenabled()
            import_module(module)
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + 5000
    assert gc.get_freeze_count() == 0


def test_what_is_made_without_an_import_is_collected_during_a_run() -> None:
    class Cycle:
        pass

    with collecting_only_new():
        one = Cycle()
        one.own, gone = one, weakref.ref(one)  # type: ignore[attr-defined]
        del one
        with loading_modules():
            pass
        gc.collect()
        assert gone() is None


def test_garbage_of_imports_is_collected_where_that_is_asked_for() -> None:
    class Cycle:
        pass

    one = Cycle()
    one.own, gone = one, weakref.ref(one)  # type: ignore[attr-defined]
    with collecting_only_new():
        del one
        gc.collect()
        assert gone() is not None, "passed over, as what an import left"
        collect_all()
        assert gone() is None
        assert gc.get_freeze_count() > 1000, "and all else is again"
    assert gc.get_freeze_count() == 0
    collect_all()
    assert gc.get_freeze_count() == 0


def test_modules_are_not_passed_over_where_nobody_would_end_that(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with collecting_only_new(), loading_modules():
            import_module(module)
        assert gc.get_freeze_count() < before + 5000
    finally:
        gc.unfreeze()
    with pytest.raises(ValueError), collecting_only_new():
        raise ValueError
    monkeypatch.delitem(sys.modules, module)
    with loading_modules():
        import_module(module)
    assert gc.get_freeze_count() == 0
