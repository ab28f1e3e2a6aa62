"""Gram matrices against float64, in float32 and in 8-bit integers."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from quantkit.maths import gram as gram_file
from quantkit.maths.gram import (
    EIGHT_BIT_COLUMNS,
    EIGHT_BIT_TOKENS,
    HUGE_TOKENS,
    REACH,
    GramAccumulator,
    InputStatistics,
    SquaresAccumulator,
)

CPU = torch.device("cpu")
COLUMNS = EIGHT_BIT_COLUMNS + 5  # no multiple of a vector register


def _inputs(tokens: int, columns: int = COLUMNS) -> Tensor:
    """Correlated columns of very different size."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.logspace(-3, 3, columns)


def _seen(batches: list[Tensor], *, eight_bit: bool) -> InputStatistics:
    accumulator = GramAccumulator(batches[0].shape[-1], CPU, eight_bit=eight_bit)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result()


def _relative(gram: Tensor, inputs: Tensor) -> Tensor:
    """Errors as shares of the geometric mean of their two diagonal elements."""
    exact = inputs.double().T @ inputs.double()
    size = exact.diagonal().clamp(min=1e-30).sqrt()
    return ((gram.double() - exact) / size[:, None] / size).abs()


@pytest.mark.parametrize("columns", [1, 7, 64, 65, COLUMNS])
def test_float32_sums_are_those_of_float64(columns: int) -> None:
    inputs = _inputs(300, columns)
    seen = _seen([inputs[:100].view(2, 50, columns), inputs[100:]], eight_bit=False)
    assert _relative(seen.gram, inputs).max() < 1e-5
    assert torch.equal(seen.gram, seen.gram.T)
    torch.testing.assert_close(seen.mean_abs, inputs.abs().mean(dim=0))
    assert seen.tokens == 300


@pytest.mark.parametrize("tokens", [1, 63, EIGHT_BIT_TOKENS, EIGHT_BIT_TOKENS + 700])
def test_eight_bit_sums_keep_what_the_rounding_allows(tokens: int) -> None:
    inputs = _inputs(tokens)
    seen = _seen(list(inputs.split(500)), eight_bit=True)
    # a step is at most REACH / 127 of a column's root mean square, and rounding errs by half of it
    assert _relative(seen.gram, inputs).max() < 2 * REACH / 127 / 2
    if tokens >= EIGHT_BIT_TOKENS:  # many roundings average out
        error = _relative(seen.gram, inputs)
        assert error.diagonal().max() < 0.005
        assert error.max() < 0.01
    assert torch.equal(seen.gram, seen.gram.T)
    torch.testing.assert_close(seen.mean_abs, inputs.abs().mean(dim=0))
    torch.testing.assert_close(seen.importance.squares, inputs.square().sum(dim=0))
    assert seen.tokens == tokens


def test_eight_bit_sums_stay_positive_semidefinite() -> None:
    inputs = _inputs(100)  # of rank 100 in 261 columns
    gram = _seen([inputs], eight_bit=True).gram.double()
    size = gram.diagonal().sqrt()
    assert torch.linalg.eigvalsh(gram / size[:, None] / size).min() > -1e-5


def test_one_token_of_huge_values_does_not_blur_the_others() -> None:
    inputs = _inputs(EIGHT_BIT_TOKENS)
    huge = inputs.clone()
    huge[17] *= 1e3
    own = huge[17].double()[:, None] * huge[17].double()
    others = torch.cat([inputs[:17], inputs[18:]])
    left = _seen([huge], eight_bit=True).gram.double() - own
    size = others.double().square().sum(dim=0).sqrt()
    kept = 2.0**-22 * own.abs() / size[:, None] / size  # the digits that float32 has beside the huge token
    assert (_relative(left, others) <= kept + 0.01).all()


@pytest.mark.parametrize("apart", [7, HUGE_TOKENS, 2 * HUGE_TOKENS + 60])
def test_every_token_far_out_counts_once(apart: int) -> None:
    inputs = _inputs(4 * EIGHT_BIT_TOKENS)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(len(inputs), generator=generator)[:apart]
    inputs[chosen, torch.randint(COLUMNS, (apart,), generator=generator)] *= 1e3
    seen = GramAccumulator(COLUMNS, CPU, eight_bit=True)
    for batch in inputs.split(EIGHT_BIT_TOKENS // 2):
        seen.add(batch)
    gram = seen.result().gram
    assert _relative(gram, inputs).max() < 0.01
    near = torch.ones(len(inputs), dtype=torch.bool)
    near[chosen] = False
    far = inputs[chosen].double()
    left = gram.double() - far.T @ far
    size = inputs[near].double().square().sum(dim=0).sqrt()
    digits = 2.0**-20 * (far.T @ far).abs() / size[:, None] / size
    assert (_relative(left, inputs[near]) <= digits + 0.02).all()


def test_tokens_out_of_reach_that_are_not_huge_have_steps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(2 * EIGHT_BIT_TOKENS)
    root = inputs.square().mean(dim=0).sqrt()
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randperm(len(inputs), generator=generator)[: len(inputs) // 50]
    at = torch.randint(COLUMNS, (len(chosen),), generator=generator)
    inputs[chosen, at] = root[at] * REACH * (1 + torch.rand(len(chosen), generator=generator))
    monkeypatch.setattr(GramAccumulator, "_add_product", _refused)
    gram = _seen(list(inputs.split(EIGHT_BIT_TOKENS // 2)), eight_bit=True).gram
    assert _relative(gram, inputs).max() < 2 * REACH / 127 / 2
    near = torch.ones(len(inputs), dtype=torch.bool)
    near[chosen] = False
    far = inputs[chosen].double()
    size = inputs[near].double().square().sum(dim=0).sqrt()
    apart = (
        (gram.double() - far.T @ far - inputs[near].double().T @ inputs[near].double()) / size[:, None] / size
    ).abs()
    assert apart.diagonal().max() < 0.01 and apart.max() < 0.02


def test_inputs_are_let_go_before_their_codes_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (part.clone().numpy() for part in _inputs(EIGHT_BIT_TOKENS).split(EIGHT_BIT_TOKENS // 2))
    first[::50, 3] *= 100  # far out, and some of these huge
    watched, held = weakref.ref(first), []
    monkeypatch.setattr(gram_file, "add_gram", lambda *_, **__: held.append(watched() is not None))
    accumulator = GramAccumulator(COLUMNS, CPU, eight_bit=True)
    accumulator.add(torch.from_numpy(first))
    del first
    accumulator.add(torch.from_numpy(second))
    assert held == [False]


def test_nothing_of_inputs_is_held_once_they_are_settled() -> None:
    inputs = _inputs(300)
    inputs[17] *= 1e3
    inputs[20:23] *= 30
    settled, other = (GramAccumulator(COLUMNS, CPU, eight_bit=True) for _ in range(2))
    mine = inputs.clone().numpy()
    watched = weakref.ref(mine)
    settled.add(torch.from_numpy(mine))
    del mine
    assert watched() is not None
    settled.settle()
    assert watched() is None
    other.add(inputs)
    assert torch.equal(settled.result().gram, other.result().gram)


def test_tokens_far_out_may_come_in_several_dtypes() -> None:
    inputs = _inputs(2 * EIGHT_BIT_TOKENS)
    root = inputs.square().mean(dim=0).sqrt()
    inputs[[5, 6, -5, -6], [1, 2, 1, 2]] = root[[1, 2, 1, 2]] * REACH * 1.7
    first, second = inputs[:EIGHT_BIT_TOKENS].bfloat16(), inputs[EIGHT_BIT_TOKENS:]
    mixed, wide = (GramAccumulator(COLUMNS, CPU, eight_bit=True) for _ in range(2))
    for accumulator, part in ((mixed, first), (wide, first.float())):
        for rows in (part, second):
            accumulator.add(rows)
            accumulator.settle()
        assert len(accumulator._far) == 2
    assert torch.equal(mixed.result().gram, wide.result().gram)


def _refused(self: GramAccumulator, rows: Tensor) -> None:
    raise AssertionError(f"{len(rows)} tokens are multiplied in float32")


def test_columns_without_inputs_stay_zero() -> None:
    inputs = _inputs(300)
    inputs[:, 3] = 0
    seen = _seen([inputs], eight_bit=True)
    assert not seen.gram[3].any() and not seen.gram[:, 3].any()
    assert torch.isfinite(seen.gram).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_lost(value: float) -> None:
    inputs = _inputs(300)
    inputs[5, 9] = value
    assert not torch.isfinite(_seen([inputs], eight_bit=True).gram.diagonal()[9])


def test_sums_do_not_depend_on_the_threads() -> None:
    inputs = list(_inputs(1000).split(250))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(_seen(inputs, eight_bit=True).gram)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


def test_narrow_inputs_are_summed_in_float32() -> None:
    inputs = _inputs(300, EIGHT_BIT_COLUMNS - 1)
    assert torch.equal(_seen([inputs], eight_bit=True).gram, _seen([inputs], eight_bit=False).gram)


@pytest.mark.parametrize("eight_bit", [True, False])
def test_a_part_is_one_token_in_so_many_of_each_batch(eight_bit: bool) -> None:
    batches = [_inputs(300), _inputs(50)]
    accumulator = GramAccumulator(COLUMNS, CPU, eight_bit=eight_bit, every=4)
    for batch in batches:
        accumulator.add(batch)
    part, chosen = accumulator.result(), _seen([batch[::4] for batch in batches], eight_bit=eight_bit)
    assert part.tokens == chosen.tokens == 75 + 13
    assert torch.equal(part.gram, chosen.gram) and torch.equal(part.mean_abs, chosen.mean_abs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_alone_are_the_diagonal(dtype: torch.dtype) -> None:
    inputs = _inputs(300).to(dtype)
    accumulator = SquaresAccumulator(COLUMNS, CPU)
    for batch in (inputs[:7].view(1, 7, COLUMNS), inputs[7:]):
        accumulator.add(batch)
    seen, exact = accumulator.result(), inputs.double()
    assert seen.tokens == 300 and seen.gram.numel() == 0
    torch.testing.assert_close(seen.importance.squares, exact.square().sum(dim=0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.mean_abs, exact.abs().mean(dim=0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_result_may_be_taken_twice(eight_bit: bool) -> None:
    inputs = _inputs(300)
    inputs[17] *= 1e3
    accumulator = GramAccumulator(inputs.shape[1], torch.device("cpu"), eight_bit=eight_bit)
    accumulator.add(inputs)
    accumulator.add_huge(inputs[:3].clone())
    first = accumulator.result().gram.clone()
    assert torch.equal(accumulator.result().gram, first)
