"""Causal attention beside float64: what rounding to the values' dtype may do, and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit import device as devices
from quantkit.maths import attention
from quantkit.maths.attention import CHUNK, causal_attention

HALF_STEP = 2.0**-8
"""The most that rounding to bfloat16 changes a number by, as a share of it."""

SHAPES = [  # heads, key heads, length, width, value width
    pytest.param(4, 4, 48, 16, 16, id="a head each"),
    pytest.param(6, 2, 300, 16, 16, id="shared heads, chunks and a rest"),
    pytest.param(2, 1, CHUNK, 8, 8, id="one chunk"),
    pytest.param(3, 3, 2 * CHUNK, 24, 16, id="narrow values"),
    pytest.param(2, 2, 1, 8, 8, id="one token"),
    pytest.param(4, 2, 65, 80, 72, id="wider than a panel of keys or values"),
    pytest.param(5, 1, 6 * 25, 64, 64, id="whole tiles, one head for all"),
]


WAYS = {
    "bfloat16 loops": {"multiplies_wide_floats", "multiplies_wide_bfloat16"},
    "float32 loops": {"multiplies_wide_floats"},
    "torch": set(),
}
"""What the processor is taken to have."""


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of this file by each way."""
    for name, here in (
        ("multiplies_wide_floats", attention.multiplies_wide_floats()),
        ("multiplies_wide_bfloat16", attention.multiplies_wide_bfloat16()),
    ):
        if name in WAYS[request.param] and not here:
            pytest.skip("not on this processor")
        monkeypatch.setattr(attention, name, lambda name=name: name in WAYS[request.param])
    if request.param == "float32 loops":
        monkeypatch.setattr(attention, "multiplies_bfloat16", lambda: False)
    return str(request.param)


def _tensors(heads: int, groups: int, length: int, width: int, wide: int, spread: float = 1.0) -> list[Tensor]:
    made = torch.Generator().manual_seed(length)
    sizes = [(2, heads, length, width), (2, groups, length, width), (2, groups, length, wide)]
    # of bfloat16, so that no way rounds them
    query, key, value = (torch.randn(size, generator=made).bfloat16() for size in sizes)
    return [query.float() * spread, key.float(), value]


def _by_loops(way: str) -> None:
    if way == "torch":
        pytest.skip("torch promises no bits")


def _exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output [batch, length, heads, width] in float64, and the same of the values' sizes."""
    shared, length = query.shape[1] // key.shape[1], query.shape[2]
    keys, values = (x.double().repeat_interleave(shared, dim=1) for x in (key, value))
    scores = (query.double() @ keys.mT) * scale
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(1, 2), (weights @ values.abs()).transpose(1, 2)


@pytest.mark.parametrize(("heads", "groups", "length", "width", "wide"), SHAPES)
@pytest.mark.parametrize("spread", [1.0, 32.0], ids=["even", "peaked"])
def test_near_float64(heads: int, groups: int, length: int, width: int, wide: int, spread: float) -> None:
    query, key, value = _tensors(heads, groups, length, width, wide, spread)
    found = causal_attention(query, key, value, width**-0.5)
    exact, sizes = _exact(query, key, value, width**-0.5)
    assert found.dtype == torch.bfloat16
    # weights and the output are rounded once each; float32 scores of up to some hundreds are off by 1e-4 at most
    assert bool(((found.double() - exact).abs() <= 2.1 * HALF_STEP * sizes + 1e-30).all())


@pytest.mark.parametrize(("heads", "groups", "length", "width", "wide"), SHAPES)
def test_float32_values_keep_float32(heads: int, groups: int, length: int, width: int, wide: int) -> None:
    query, key, value = _tensors(heads, groups, length, width, wide)
    found = causal_attention(query, key, value.float(), width**-0.5)
    exact, sizes = _exact(query, key, value, width**-0.5)
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= 2e-6 * sizes + 1e-30).all())


def test_queries_and_keys_are_rounded_to_bfloat16_at_most(way: str) -> None:
    query, key, value = _tensors(6, 2, 300, 32, 32)
    query, key = query + query.roll(1) / 3, key + key.roll(1) / 3
    exact, sizes = _exact(query, key, value, 0.2)
    rounded, _ = _exact(query.bfloat16(), key.bfloat16(), value, 0.2)
    found = causal_attention(query, key, value, 0.2)
    wanted = rounded if way == "bfloat16 loops" else exact
    # less than rounding both once more would add
    assert bool(((found.double() - wanted).abs() <= 1.7 * HALF_STEP * sizes + 1e-30).all())


def test_as_near_as_pytorchs_kernel_and_nearer_where_nothing_is_rounded(way: str) -> None:
    query, key, value = _tensors(6, 2, 300, 32, 32, 4.0)
    if way != "bfloat16 loops":
        query, key = query + query.roll(1) / 3, key + key.roll(1) / 3
    exact, _ = _exact(query, key, value, 0.2)
    found = causal_attention(query, key, value, 0.2)
    theirs = F.scaled_dot_product_attention(
        query.bfloat16(), key.bfloat16(), value, is_causal=True, enable_gqa=True, scale=0.2
    ).transpose(1, 2)
    share = 1.02 if way == "bfloat16 loops" else 0.9
    assert (found.double() - exact).abs().mean() < share * (theirs.double() - exact).abs().mean()


def test_parts_of_larger_tensors_give_the_same_bits(way: str) -> None:
    """Heads beside each other, as a linear gives them; every second number; parts of a cache of keys."""
    _by_loops(way)
    given = _tensors(6, 2, 130, 16, 16)
    wanted = causal_attention(*given, 0.25)
    side_by_side = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in given)
    assert torch.equal(causal_attention(*side_by_side, 0.25), wanted)
    apart = (torch.stack([tensor, tensor * torch.nan], dim=-1)[..., 0] for tensor in given)
    assert torch.equal(causal_attention(*apart, 0.25), wanted)
    longer = (F.pad(tensor, (0, 0, 3, 5), value=torch.nan)[:, :, 3:-5] for tensor in given)
    assert torch.equal(causal_attention(*longer, 0.25), wanted)


def test_a_sequence_gives_the_same_bits_in_any_batch(way: str) -> None:
    _by_loops(way)
    query, key, value = _tensors(6, 2, 130, 16, 16)
    whole = causal_attention(query, key, value, 0.25)
    for row in range(2):
        own = slice(row, row + 1)
        assert torch.equal(causal_attention(query[own], key[own], value[own], 0.25), whole[own])


def test_tokens_see_nothing_behind_them() -> None:
    query, key, value = _tensors(4, 2, 200, 16, 16)
    before = causal_attention(query, key, value, 0.25)
    key[:, :, 150:], value[:, :, 150:] = 1e4, 1e4
    after = causal_attention(query, key, value, 0.25)
    assert torch.equal(after[:, :150], before[:, :150])
    assert not torch.equal(after[:, 150:], before[:, 150:])


def test_nan_in_a_score_is_not_hidden() -> None:
    query, key, value = _tensors(2, 2, 140, 16, 16)
    query[0, 0, 70] = float("nan")
    found = causal_attention(query, key, value, 0.25)
    assert bool(found[0, 70, 0].isnan().all())
    assert int(found.isnan().any(dim=-1).sum()) == 1


def test_matrix_units_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_loops_may", lambda: True)
    for has, wide, narrow in (
        ({"avx512_f"}, True, True),
        ({"avx512_f", "avx512_bf16"}, True, True),
        ({"avx512_f", "avx512_bf16", "amx_bf16"}, True, False),
        ({"avx2"}, False, False),
    ):
        monkeypatch.setattr(devices, "_can", lambda *names, has=has: bool(has & {*names}))
        for name in ("multiplies_bfloat16", "multiplies_wide_bfloat16", "multiplies_wide_floats"):
            monkeypatch.setattr(attention, name, getattr(devices, name))
        assert (attention.has_own_loops(torch.float32), attention.has_own_loops(torch.bfloat16)) == (wide, narrow)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale_is_one(scale: float) -> None:
    query, key, value = _tensors(4, 2, 70, 8, 8)
    exact, sizes = _exact(query, key, value, scale)
    found = causal_attention(query, key, value, scale)
    assert bool(((found.double() - exact).abs() <= 2.1 * HALF_STEP * sizes + 1e-30).all())


def test_one_token_for_all_may_be_given_once(way: str) -> None:
    _by_loops(way)
    query, key, value = _tensors(4, 2, 70, 8, 8)
    key, value = key[:, :, :1].expand(-1, -1, 70, -1), value[:, :1].expand(-1, 2, -1, -1)
    wanted = causal_attention(query, key.contiguous(), value.contiguous(), 0.3)
    assert torch.equal(causal_attention(query, key, value, 0.3), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda query, key, value: (query[:, :3], key, value),
        lambda query, key, value: (query[..., :6], key, value),
        lambda query, key, value: (query[:, :, :5], key, value),
        lambda query, key, value: (query, key[:1], value),
        lambda query, key, value: (query, key, value[:, :, :-1]),
        lambda query, key, value: (query, key, value[:, :1]),
        lambda query, key, value: (query, key, value.half()),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[..., tuple[Tensor, ...]]) -> None:
    with pytest.raises(ValueError, match="queries|values in"):
        causal_attention(*change(*_tensors(4, 2, 10, 8, 8)), 0.3)
