"""The floor: operations counted by hand for the tiny model."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.model.reader import open_source
from quantkit.reference.floor import floor_of, gemm_flop_per_s, job_flop


def test_operations_are_those_counted_by_hand(tiny_llama: Path) -> None:
    # hidden 64, MLP 128, 4 heads of 16, 2 key-value heads, 2 blocks; 3 sequences of 10 tokens
    tokens = 30
    query = output = 64 * 64
    key = value = 64 * 32
    gate = up = down = 64 * 128
    attention = 2 * tokens * 10 * 64
    before_down = 2 * tokens * (query + key + value + output + gate + up) + attention
    whole = before_down + 2 * tokens * down
    # inputs of q/k/v, of o, of gate/up: 64 wide; of down: 128 wide
    grams = tokens * (3 * 64 * 65 + 128 * 129)
    one, two = job_flop(open_source(str(tiny_llama)), 3, 10)
    assert one == (whole + grams) + (before_down + grams)
    assert two == (before_down + grams + whole) + (before_down + grams)


def test_the_floor_is_the_operations_over_the_rate(tiny_llama: Path) -> None:
    one, two = job_flop(open_source(str(tiny_llama)), 3, 10)
    floor = floor_of(open_source(str(tiny_llama)), 3, 10, 2e9)
    assert (floor.one_pass_s, floor.two_pass_s) == (one / 2e9, two / 2e9)


def test_the_rate_is_that_of_a_real_product() -> None:
    assert 1e9 < gemm_flop_per_s(torch.device("cpu")) < 1e14
