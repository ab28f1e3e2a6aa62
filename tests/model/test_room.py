"""How many rows may wait, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.device import Arithmetic
from quantkit.maths.attention import CHUNK
from quantkit.maths.int_products import code_bytes
from quantkit.model.blocks import ARCHITECTURES
from quantkit.model.room import BlockSizes, left_behind, running_bytes

SMALL = BlockSizes(
    shapes=((64, 32), (32, 48)),
    hidden=16,
    length=512,
    heads=2,
    state_bytes=4,
    linear_bytes=4,
    model_bytes=2,
    rounded_bytes=2,
    stored_bytes=2,
    ways=1,
    device="cpu",
    left_behind=(0, 0),
    states_in_memory=False,
)


def test_a_batch_lies_beside_rows_that_wait() -> None:
    batch = 4 * 1024 * (4 * 16 + 2 * 64)
    assert SMALL.batch == 2 and SMALL.batch_bytes == batch
    assert SMALL.taken_bytes == batch + 4 * 48**2 + SMALL.grown_bytes
    corrected = replace(SMALL, ways=2)
    assert corrected.taken_bytes == 2 * batch + 24 * 48**2 + corrected.grown_bytes
    assert replace(SMALL, device="cuda").batch_bytes == 8 * batch
    assert replace(SMALL, linear_bytes=2).batch_bytes == 1024 * (4 * 4 * 16 + 2 * 2 * 64), "hidden states stay wide"


def test_a_sequence_longer_than_a_batch_is_one() -> None:
    long = replace(SMALL, length=4096)
    assert long.batch == 1
    assert long.batch_bytes == 4 * 4096 * (4 * 16 + 2 * 64) + 3072 * CHUNK * 2 * (4 + 4)


def test_rounding_a_wide_group_takes_more_than_a_batch() -> None:
    wide = replace(SMALL, shapes=((64, 32), (2000, 2048)))
    rounding = 8 * 2048 * (2000 + 2048)
    assert wide.taken_bytes == rounding + wide.grown_bytes
    assert replace(wide, ways=2).rounding_bytes(2000, 2048) == rounding + 20 * 2048**2 + 24 * 2000 * 2048


@pytest.mark.parametrize(
    ("model", "rounded", "stored", "ways", "grown"),
    [(2, 2, 2, 1, 1), (4, 4, 2, 1, 3), (2, 2, 2, 2, 3), (1, 1, 4, 1, 0), (2, 1.25, 2, 1, 0.25), (2, 1.25, 2, 2, 2.25)],
)
def test_codes_and_weights_that_run_come_for_those_that_were_stored(
    model: int, rounded: float, stored: int, ways: int, grown: float
) -> None:
    values = 64 * 32 + 32 * 48
    sizes = replace(SMALL, model_bytes=model, rounded_bytes=rounded, stored_bytes=stored, ways=ways)
    assert sizes.grown_bytes == grown * values


def test_what_a_weight_takes_that_runs() -> None:
    half, eighth = (Arithmetic(torch.float32, torch.bfloat16, False, in_eight) for in_eight in (False, True))
    assert running_bytes(half, transposed=False, run=64) == running_bytes(half, transposed=False) == 2
    assert running_bytes(eighth, transposed=True, run=64) == 2, "Conv1D stays as it is"
    assert running_bytes(eighth, transposed=False) == code_bytes()
    assert [running_bytes(eighth, transposed=False, run=run) for run in (64, 32)] == [1 + 8 / 64, 1.25]


def test_rows_wait_with_hidden_states_the_widest_input_and_what_is_left() -> None:
    assert SMALL.waiting_bytes == 512 * 4 * (16 + 48)
    assert replace(SMALL, linear_bytes=2).waiting_bytes == 512 * (4 * 16 + 2 * 48), "in what linears multiply"
    narrow = replace(SMALL, shapes=((24, 16), (16, 16), (40, 16), (16, 20)), linear_bytes=2)
    assert narrow.waiting_bytes == 512 * 4 * (16 + 16), "a norm's output is as wide as the states are"
    assert replace(SMALL, states_in_memory=True).waiting_bytes == 512 * 4 * 48, "in the place of states that were there"
    assert replace(SMALL, states_in_memory=True).file_bytes(1) == SMALL.waiting_bytes, "of others they stay"
    assert replace(SMALL, left_behind=(100, 10)).waiting_bytes == 512 * 4 * (16 + 48 + 100)


@pytest.mark.parametrize(
    ("family", "dtype", "device", "left"),
    [
        ("LlamaForCausalLM", torch.bfloat16, "cpu", (0, 0)),  # our own attention lets go of what it has read
        ("LlamaForCausalLM", torch.float32, "cpu", (96, 0)),
        ("LlamaForCausalLM", torch.bfloat16, "cuda", (96, 0)),
        ("Phi3ForCausalLM", torch.bfloat16, "cpu", (96, 128)),
        ("GPT2LMHeadModel", torch.bfloat16, "cpu", (96, 128)),
        ("Gemma2ForCausalLM", torch.bfloat16, "cpu", (96 + 4 * 512, 4 * 512)),
    ],
)
def test_what_a_model_holds_beside(family: str, dtype: torch.dtype, device: str, left: tuple[int, int]) -> None:
    shapes = ((96, 32), (32, 40), (128, 32), (32, 64))
    how = Arithmetic(torch.float32, dtype, False, False)
    assert left_behind(ARCHITECTURES[family], how, torch.device(device), shapes, 4, 512) == left


def test_what_goes_to_a_file_and_comes_back() -> None:
    sizes = replace(SMALL, shapes=((96, 16), (16, 40), (128, 16), (16, 64)), linear_bytes=2)
    assert sizes.file_bytes(3) == 3 * sizes.waiting_bytes and replace(sizes, device="cuda").file_bytes(3) == 0
    assert sizes.filed_bytes == 512 * (4 * (2 * 16 + 16) + 2 * (40 + 64))
    assert replace(sizes, left_behind=(10, 5), ways=2).filed_bytes == 2 * (sizes.filed_bytes + 512 * 4 * 15)


def test_whole_batches_wait_the_first_ones() -> None:
    each = SMALL.waiting_bytes
    assert replace(SMALL, ways=2).waiting_bytes == 2 * each
    for room, waiting in ((7 * each, 7), (7 * each - 1, 6), (6 * each - 1, 4), (2 * each - 1, 0), (0, 0)):
        assert SMALL.waiting_sequences(7, SMALL.taken_bytes + room) == waiting
    assert SMALL.waiting_sequences(7, 0) == 0
    assert SMALL.waiting_sequences(7, 10**12) == 7
