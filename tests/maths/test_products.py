from __future__ import annotations

import pytest
import torch

from quantkit.maths import products
from quantkit.maths.products import padded, rounding_allowed, times_transposed


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_those_of_float32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(products, "_onednn_linear", lambda: None)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(96, 300, generator=generator)
    for left, right in [
        (whole[:10], whole),
        (whole[:, 7:95], whole[20:30, 7:95]),
        (whole.T, whole[:, :5].T),  # turned: neither is contiguous
        (whole[:0], whole),
    ]:
        found, exact = times_transposed(left, right), left.double() @ right.double().T
        assert found.shape == exact.shape
        assert torch.allclose(found.double(), exact, atol=1e-4)


def test_sizes_are_few() -> None:
    assert [padded(count) for count in (1, 64, 65, 700, 1024, 1025, 3000)] == [64, 64, 128, 1024, 1024, 2048, 3072]
    assert len({padded(count) for count in range(1, 4097)}) == 8


def test_the_setting_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), rounding_allowed():
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
