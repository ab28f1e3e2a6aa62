from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.device import multiplies_wide_floats
from quantkit.maths import products
from quantkit.maths.products import add_times_transposed, rounding_allowed, times_transposed


@pytest.fixture(params=["own", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(products, "_by_own_loops", lambda left: False)
    elif not multiplies_wide_floats():
        pytest.skip("the loops are AVX-512's")


def _pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(96, 300, generator=generator)
    deep = torch.randn(70, 900, generator=generator)
    return [
        (whole[:10], whole),
        (whole[:, 7:95], whole[20:30, 7:95]),
        (whole.T, whole[:, :5].T),  # turned: neither is contiguous
        (whole[::2, ::3], whole[1::2, ::3]),
        (deep, deep[:, :]),  # more than is summed at once
        (deep[:7], deep),
        (whole[:1], whole[:1]),
        (whole.T, whole.T),  # several blocks of rows and panels of columns
        (whole[:, :1], whole[:50, :1]),
        (whole[:1].expand(8, 300), whole[:1].expand(70, 300)),
        (whole[:0], whole),
        (whole[:, :0], whole[:, :0]),
    ]


@pytest.mark.parametrize("case", range(len(_pairs())))
def test_products_are_those_of_float32(case: int) -> None:
    left, right = _pairs()[case]
    found, exact = times_transposed(left, right), left.double() @ right.double().T
    assert found.shape == exact.shape
    assert torch.allclose(found.double(), exact, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, -1.0])
@pytest.mark.parametrize("case", range(len(_pairs())))
def test_products_are_added_to_part_of_a_matrix(case: int, factor: float) -> None:
    left, right = _pairs()[case]
    whole = torch.linspace(-1, 1, (len(left) + 2) * (len(right) + 5)).view(len(left) + 2, -1)
    before, part = whole.clone(), (slice(1, len(left) + 1), slice(3, len(right) + 3))
    add_times_transposed(whole[part], left, right, factor)
    exact = before.double()
    exact[part] += factor * left.double() @ right.double().T
    assert torch.allclose(whole.double(), exact, atol=1e-4)
    around = torch.ones_like(whole, dtype=torch.bool)
    around[part] = False
    assert torch.equal(whole[around], before[around])


def test_bands_of_a_right_factor_and_tasks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.maths import int_kernel

    left, right = (part.T for part in (torch.linspace(-1, 1, 40 * 300).view(40, 300).sin() for _ in range(2)))
    whole = times_transposed(left, right)
    monkeypatch.setattr(products, "PANEL_VALUES", 64 * 40)
    assert torch.equal(times_transposed(left, right), whole)
    for tasks in (1, 3, 20):
        monkeypatch.setattr(int_kernel, "tasks_of_block", lambda *_, tasks=tasks: tasks)
        assert torch.equal(times_transposed(left, right), whole)


def test_what_loops_cannot_multiply_is_refused_before() -> None:
    whole = torch.ones(6, 6)
    for total, left, right in [
        (whole, whole[:, :4], whole),
        (whole, whole[:4], whole),
        (whole, whole, whole[:4]),
    ]:
        with pytest.raises((ValueError, RuntimeError)):
            add_times_transposed(total, left, right)
    assert torch.equal(whole, torch.ones(6, 6))
    double = times_transposed(whole.double(), whole.double())
    assert double.dtype == torch.float64 and bool((double == 6).all())


def test_what_does_not_end_in_a_number_stays_that() -> None:
    left, right = torch.ones(7, 5), torch.ones(70, 5)
    left[3, 2], right[66, 1] = torch.nan, torch.inf
    found = times_transposed(left, right)
    assert torch.equal(found.isnan().nonzero()[:, 0].unique(), torch.tensor([3]))
    assert bool(found[[0, 1, 2, 4, 5, 6], 66].isinf().all()) and bool((found[0, :66] == 5).all())


def test_the_setting_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), rounding_allowed():
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
