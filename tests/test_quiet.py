"""What is set for the libraries' sake, and given back."""

from __future__ import annotations

import gc

import pytest

from quantkit.quiet import collecting_only_new, set_aside


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


def test_what_is_loaded_during_a_run_is_passed_over_as_well() -> None:
    loaded: list[list[int]] = []
    with collecting_only_new():
        before = gc.get_freeze_count()
        loaded += ([] for _ in range(5000))
        set_aside()
        assert gc.get_freeze_count() >= before + len(loaded)
    set_aside()
    assert gc.get_freeze_count() == 0  # nothing would ever bring it back


def test_what_someone_else_set_aside_is_not_added_to() -> None:
    gc.freeze()
    try:
        before, loaded = gc.get_freeze_count(), [[] for _ in range(5000)]
        with collecting_only_new():
            set_aside()
        assert gc.get_freeze_count() < before + len(loaded)
    finally:
        gc.unfreeze()
