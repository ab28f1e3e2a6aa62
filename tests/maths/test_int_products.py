"""Products of 8-bit integers against 64-bit ones: by torch and by loops of our own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from quantkit import device as devices
from quantkit.maths import int_products
from quantkit.maths.compiled import readable
from quantkit.maths.gram import ColumnSums
from quantkit.maths.int_products import (
    Pairs,
    Quads,
    Torch,
    Way,
    add_gram,
    add_products,
    code_bytes,
    right_factor,
    rounded_columns,
)

has_avx2 = pytest.mark.skipif(not devices.has_avx2(), reason="the loops are AVX2's")
has_units = pytest.mark.skipif(not devices.multiplies_quads(), reason="the loops are those of AVX-512's units")
OWN = [pytest.param(Pairs(), marks=has_avx2, id="pairs"), pytest.param(Quads(), marks=has_units, id="quads")]


@pytest.fixture(params=[pytest.param(Torch(), id="torch"), *OWN], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    given: Way = request.param
    monkeypatch.setattr(int_products, "way", lambda: given)
    return given


def _codes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    codes[0] = 127  # sums as large as they get
    return codes


def _columns(codes: Tensor, pieces: Sequence[int] | None = None) -> Tensor:
    """Codes of tokens as Gram matrices are summed from, of so many tokens a piece."""
    parts = codes.float().split(list(pieces) if pieces else [len(codes)])
    return rounded_columns([ColumnSums(part.numpy()) for part in parts], torch.ones(codes.shape[1]))


@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(1, 1, 1), (6, 16, 2), (64, 48, 96), (100, 50, 33), (7, 257, 577), (13, 64, 130)]
)
def test_products_are_exact(rows: int, columns: int, inner: int) -> None:
    left, right = _codes(rows, inner), _codes(columns, inner)
    factor = right_factor(right)
    exact = left.long() @ right.long().T
    found = factor.scaled_products(left, torch.ones(rows), torch.ones(columns), torch.zeros(columns))
    assert torch.equal(found.long(), exact)  # below 2^24, so that float32 has them
    alone = factor.scaled_products(left[:1], torch.ones(1), torch.ones(columns), torch.zeros(columns))
    assert torch.equal(alone.long(), exact[:1])


def test_the_largest_sums_do_not_overflow() -> None:
    right = torch.tensor([127, -127], dtype=torch.int8)[:, None].repeat(1, 133144)
    exact = (right.long() @ right.long().T).float()
    found = right_factor(right).scaled_products(right[:1], torch.ones(1), torch.ones(2), torch.zeros(2))
    assert torch.equal(found, exact[:1])
    gram = torch.full((2, 2), torch.nan)
    add_gram(_columns(right.T), torch.ones(2), gram, fresh=True)
    assert torch.equal(gram.triu(), exact.triu())


@pytest.mark.parametrize("way", OWN, indirect=True)
def test_products_of_nothing_are_0(way: Way) -> None:
    for rows, columns, inner in ((0, 3, 5), (3, 5, 0)):
        factor = right_factor(torch.zeros(columns, inner, dtype=torch.int8))
        left = torch.zeros(rows, inner, dtype=torch.int8)
        found = factor.scaled_products(left, torch.ones(rows), torch.ones(columns), torch.zeros(columns))
        assert found.shape == (rows, columns) and not found.any()
    gram = torch.full((5, 5), torch.nan)
    add_gram(_columns(torch.zeros(0, 5)), torch.ones(5), gram, fresh=True)
    assert not gram.triu().any()


def test_codes_of_another_length_are_refused() -> None:
    factor = right_factor(_codes(4, 8))
    with pytest.raises(ValueError, match="4 columns times 8"):
        factor.scaled_products(_codes(4, 4), torch.ones(4), torch.ones(4), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_scaled_and_rounded_once(dtype: torch.dtype) -> None:
    left, right = _codes(50, 70), _codes(33, 70)
    along, across, bias = torch.logspace(-2, 2, 50), torch.logspace(1, -1, 33), torch.linspace(-9, 9, 33)
    found = right_factor(right).scaled_products(left, along, across, bias, dtype)
    products = (left.long() @ right.long().T).float()
    assert torch.equal(found, (products * along[:, None] * across + bias).to(dtype))


@pytest.mark.parametrize("way", [pytest.param(Quads(), marks=has_units, id="quads")], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_activation_is_written_over_its_gates(way: Way, dtype: torch.dtype) -> None:
    left, right = _codes(50, 70), _codes(133, 70)
    along, across, bias = torch.logspace(-3, 0, 50), torch.logspace(-1, -3, 133), torch.linspace(-9, 9, 133)
    gates = (torch.randn(50, 133, generator=torch.Generator().manual_seed(3)) * 9).to(dtype)
    factor = right_factor(right)
    up = factor.scaled_products(left, along, across, bias, dtype)
    exact = nn.functional.silu(gates.double()) * up.double()
    factor.write_gated(left, along, across, bias, gates)
    step = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert bool(((gates.double() - exact).abs() <= step * exact.abs() + 1e-30).all())


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (8, 48), (33, 100), (200, 161)])
def test_gram_matrices_are_summed_above_the_diagonal(tokens: int, columns: int) -> None:
    codes, scale = _codes(tokens, columns), torch.logspace(-2, 2, columns)
    gram = torch.full((columns, columns), torch.nan)
    add_gram(_columns(codes), scale, gram, fresh=True)
    add_gram(_columns(codes[:1]), scale, gram, fresh=False)
    both = torch.cat([codes, codes[:1]]).double()
    steps = scale.double()
    torch.testing.assert_close((gram / steps[:, None] / steps).triu(), (both.T @ both).triu(), rtol=1e-6, atol=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_to_codes_and_those_left_aside_count_for_nothing(dtype: torch.dtype) -> None:
    inputs = (torch.randn(203, 100, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    far = torch.zeros(203, dtype=torch.bool)
    far[[0, 5, 6, 202]] = True
    scale = torch.linspace(0.5, 2.0, 100)
    scale[7] = 0.0  # of a column without inputs
    pieces = [ColumnSums(readable(part), out) for part, out in zip(inputs.split(70), far.split(70), strict=True)]
    gram = torch.full((100, 100), torch.nan)
    add_gram(rounded_columns(pieces, scale), torch.ones(100), gram, fresh=True)
    codes = torch.where(scale > 0, inputs.float() * (1 / scale), 0.0).round()[~far].double()
    assert torch.equal(gram.triu(), (codes.T @ codes).triu().float())


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(2, 3, 5), (65, 100, 50), (33, 47, 161)])
def test_products_of_columns_are_added_to_what_is_there(tokens: int, rows: int, columns: int) -> None:
    left, right = _codes(tokens, rows), _codes(tokens, columns)
    across, along = torch.logspace(-2, 2, rows), torch.logspace(1, -1, columns)
    total = torch.ones(rows, columns)
    add_products(_columns(left), across, _columns(right), along, total)
    exact = 1 + (left.double() * across.double()).T @ (right.double() * along.double())
    torch.testing.assert_close(total, exact.float(), rtol=1e-5, atol=1e-3)


def test_a_factor_takes_the_bytes_that_are_counted_on() -> None:
    nbytes = right_factor(_codes(640, 960)).laid.nbytes
    assert nbytes == pytest.approx(640 * 960 * code_bytes(), rel=0.01)  # and what sums begin with


@pytest.mark.parametrize("way", OWN, indirect=True)
def test_all_ways_give_the_same_bits(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, others, scale = _codes(130, 200), _codes(130, 90), torch.logspace(-1, 1, 200)
    found = []
    for each in (way, Torch()):
        monkeypatch.setattr(int_products, "way", lambda each=each: each)
        gram, total = torch.linspace(-1, 1, 200 * 200).view(200, 200), torch.linspace(-3, 3, 200 * 90).view(200, 90)
        add_gram(_columns(codes), scale, gram, fresh=False)
        add_products(_columns(codes), scale, _columns(others), scale[:90], total)
        found.append(torch.cat([gram.triu(), total], dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("way", OWN, indirect=True)
@pytest.mark.parametrize("tasks", [2, 3, 20])
def test_columns_divided_among_tasks_are_all_there(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.maths import int_kernel

    codes, right, ones = _codes(100, 33), _codes(250, 33), torch.ones(250)
    grams, products = [], []
    for each in (1, tasks):
        monkeypatch.setattr(int_kernel, "tasks_of_block", lambda *_, each=each: each)
        grams.append(torch.full((100, 100), torch.nan))
        add_gram(_columns(_codes(33, 100)), torch.logspace(-1, 1, 100), grams[-1], fresh=True)
        products.append(right_factor(right).scaled_products(codes, ones[:100], ones, 0 * ones))
    assert torch.equal(grams[0].triu(), grams[1].triu())
    assert torch.equal(*products) and torch.equal(products[1].long(), codes.long() @ right.long().T)


@has_avx2
def test_few_blocks_are_divided_among_many_threads() -> None:
    from quantkit.maths.int_kernel import BLOCK_ROWS, TASKS, tasks_of_block

    assert tasks_of_block(100 * BLOCK_ROWS, 2) == 1
    assert tasks_of_block(BLOCK_ROWS, 2) == 2 * TASKS
    assert 10 * tasks_of_block(10 * BLOCK_ROWS, 64) >= 64 * TASKS


@has_avx2
@pytest.mark.parametrize(
    "told",
    [
        ("NUMBA_CPU_NAME", "generic"),
        ("NUMBA_CPU_FEATURES", "-avx2"),
        ("NUMBA_ENABLE_AVX", "0"),
        ("NUMBA_DISABLE_JIT", "1"),
    ],
)
def test_loops_compiled_for_another_processor_are_not_asked_for(
    told: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    has = {"avx2", "avx512_f", "avx512_vnni", "avx512_bf16"}
    monkeypatch.setattr(devices, "_can", lambda *names: bool(has & {*names}))
    asked = (
        devices.has_avx2,
        devices.multiplies_quads,
        devices.multiplies_wide_floats,
        devices.multiplies_wide_bfloat16,
    )
    assert all(each() for each in asked)
    monkeypatch.setenv(*told)
    assert not any(each() for each in asked)


def test_products_with_matrix_units_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture
    monkeypatch.setattr(devices, "_can", lambda *names: bool({"avx2", "avx512_vnni", "amx_int8"} & {*names}))
    assert int_products.way().name == "torch"
