"""The floor: operations counted by hand for the tiny model."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.model.reader import open_source
from quantkit.reference.floor import gemm_flop_per_s, job_flop, measure_floor
from quantkit.reference.results import Floor


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


def test_the_rate_is_that_of_a_product_and_the_floor_follows(tiny_llama: Path) -> None:
    rate = gemm_flop_per_s(torch.device("cpu"))
    assert 1e9 < rate < 1e14
    floor = measure_floor(open_source(str(tiny_llama)), 3, 10, torch.device("cpu"))
    assert floor.two_pass_flop > floor.one_pass_flop
    assert Floor(gemm_flop_per_s=2e9, one_pass_flop=10**10, two_pass_flop=3 * 10**10).two_pass_s == 15.0
