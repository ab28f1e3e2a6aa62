"""The floor under GPTQ and AWQ: the forward passes and Gram products alone, at the machine's own rate."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from quantkit.reference.results import Floor

if TYPE_CHECKING:
    import torch

    from quantkit.model.source import Source

GEMM_SIDE = 2048
"""Rows and columns of the matrices that the rate is measured with: large enough to be bound by arithmetic."""

REPETITIONS = 12


def job_flop(source: Source, sequences: int, length: int) -> tuple[int, int]:
    """Floating-point operations that calibrating on `sequences` of `length` tokens takes: (in one pass, in two).

    T is the number of tokens, n and m the inputs and outputs of a linear, d the width of all attention heads together.
    Per block:

        linears     2 T n m each
        attention   2 T L d: a causal query sees half of its L keys, and both the scores and the sums take 2 d for each
        Grams       T n (n + 1) for each distinct input: X^T X is symmetric, so one half is enough

    One pass: every linear runs once, its input is looked at on the way and its output goes on, with the quantized
    weights or without. Two passes: each block runs once for its statistics, where the linears behind the last input are
    not needed, and once with its quantized weights. The outputs of the last block are never needed. Embedding, norms,
    head and the quantizing itself are not counted, so nothing that does these products in this precision is faster.
    """
    from quantkit.model.blocks import blocks_of, head_dim

    tokens = sequences * length
    blocks = blocks_of(source)
    heads = int(source.config["num_attention_heads"])
    dimension = head_dim(source.config)
    assert dimension is not None, "a config with attention heads has their width"
    attention = 2 * tokens * length * heads * dimension
    one = two = 0
    for block in blocks:
        shapes = [[source.shape(f"{name}.weight") for name in group.linears] for group in block.groups]
        products = [sum(2 * tokens * rows * columns for rows, columns in group) for group in shapes]
        grams = sum(tokens * group[0][1] * (group[0][1] + 1) for group in shapes)
        whole = sum(products) + attention
        inputs = whole - products[-1]
        last = block is blocks[-1]
        one += (inputs if last else whole) + grams
        two += inputs + grams + (0 if last else whole)
    return one, two


def gemm_flop_per_s(device: torch.device) -> float:
    """The best rate of a float32 matrix product on a device, in operations a second."""
    import torch

    left, right = (torch.randn(GEMM_SIDE, GEMM_SIDE, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(REPETITIONS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * GEMM_SIDE**3 / best


def floor_of(source: Source, sequences: int, length: int, rate: float) -> Floor:
    """The floor of a job on a machine of this rate, in operations a second."""
    one, two = job_flop(source, sequences, length)
    return Floor(gemm_flop_per_s=rate, one_pass_flop=one, two_pass_flop=two)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
