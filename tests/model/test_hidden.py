from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from quantkit.model.hidden import HiddenStates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_written_is_read(on_disk: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = HiddenStates(values.shape, dtype, tmp_path if on_disk else None)
    states[slice(0, 2)] = values[:2]
    states[slice(2, 9)] = values[2:]
    assert torch.equal(states[slice(0, 5)], values)
    assert torch.equal(states[slice(3, 8)], values[3:])
    assert states.nbytes == values.numel() * dtype.itemsize
    states[slice(1, 2)] = values[4:]
    assert torch.equal(states[slice(1, 2)], values[4:]) and torch.equal(states[slice(2, 3)], values[2:3])


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_copy_is_its_own(on_disk: bool, tmp_path: Path) -> None:
    values = torch.randn(5, 2, 3)
    states = HiddenStates(values.shape, torch.float32, tmp_path if on_disk else None)
    states[slice(0, 5)] = values
    some = states.copy(every=2)
    states[slice(0, 5)] = torch.zeros(5, 2, 3)
    assert torch.equal(some[slice(0, 3)], values[::2])


def test_what_is_taken_is_held_by_nobody_else() -> None:
    values = torch.randn(5, 2, 3)
    states = HiddenStates(values.shape, torch.float32, together=2)
    states[slice(0, 5)] = values
    assert torch.equal(states[slice(1, 5)], values[1:]), "of several pieces"
    taken = states.take(slice(2, 4))
    assert torch.equal(taken, values[2:4])
    assert taken.untyped_storage().data_ptr() not in [storage.data_ptr() for storage in states.storages]
    assert torch.equal(states.take(slice(4, 6)), values[4:]), "the last one is short"
    assert torch.equal(states[slice(1, 2)], values[1:2])
    for gone in (slice(2, 3), slice(1, 3), slice(0, 5)):
        with pytest.raises(KeyError):
            states[gone]
    with pytest.raises(KeyError):
        states.take(slice(2, 4))
    for none in (slice(0, 1), slice(1, 3), slice(0, 4)):
        with pytest.raises(ValueError):
            states.take(none)
    with torch.inference_mode():
        states[slice(2, 4)], states[slice(4, 5)] = values[2:4], values[4:]
    assert torch.equal(states[slice(0, 5)], values)
    states[slice(2, 4)] = values[:2]  # made in that mode, written to outside of it
    assert torch.equal(states[slice(2, 4)], values[:2])


def test_states_that_come_back_take_no_more_than_they_did() -> None:
    values = torch.randn(5, 2, 3)
    states = HiddenStates(values.shape, torch.float32, together=2)
    states[slice(0, 5)] = values
    stream = io.BytesIO()
    states.write_to(stream)
    for other in (states, states.room_for(5), states.copy()):
        stream.seek(0)
        other.read_from(stream)
        assert sum(storage.nbytes() for storage in other.storages) == states.nbytes
        assert torch.equal(other.take(slice(2, 4)), values[2:4]), "in the same pieces"


def test_states_in_a_file_stay_there(tmp_path: Path) -> None:
    values = torch.randn(4, 2, 3)
    states = HiddenStates(values.shape, torch.float32, tmp_path)
    states[slice(0, 4)] = values
    assert torch.equal(states.take(slice(1, 3)), values[1:3])
    assert torch.equal(states[slice(0, 4)], values)
    assert not states.in_memory and states.storages == []


def test_the_scratch_file_has_no_name(tmp_path: Path) -> None:
    states = HiddenStates((2, 2, 2), torch.float32, tmp_path)
    states[slice(0, 2)] = torch.ones(2, 2, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_states_come_back_from_their_bytes(on_disk: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = HiddenStates(values.shape, dtype, tmp_path if on_disk else None)
    states[slice(0, 5)] = values
    stream = io.BytesIO()
    states.write_to(stream)
    assert stream.tell() == states.nbytes
    other = HiddenStates(values.shape, dtype, tmp_path if on_disk else None)
    stream.seek(0)
    other.read_from(stream)
    assert torch.equal(other[slice(0, 5)], values)
    with pytest.raises(EOFError):
        other.read_from(io.BytesIO(stream.getvalue()[:-1]))
