"""The correction towards the unquantized model's outputs, against float64 least squares."""

from __future__ import annotations

import pytest
import torch

from quantkit.maths.correction import CorrectionAccumulator

CPU = torch.device("cpu")
TOKENS, IN, OUT = 600, 24, 10


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The unquantized model's inputs, those behind what was rounded, both [tokens, in], and a weight [out, in]."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(TOKENS, IN, generator=generator) * torch.linspace(0.2, 3, IN)
    mixed = before @ (torch.eye(IN) + 0.1 * torch.randn(IN, IN, generator=generator))
    now = mixed + 0.05 * torch.randn(TOKENS, IN, generator=generator)
    return before, now, torch.randn(OUT, IN, generator=generator)


def _told() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_inputs` with a change that is a linear map of them, the same tokens in both halves of each batch, so that the
    halves agree on all of it."""
    before, _, weight = _inputs()
    twice = torch.cat([part.repeat(2, 1) for part in before[: TOKENS // 2].split(75)])
    generator = torch.Generator().manual_seed(3)
    return twice, twice @ (torch.eye(IN) + 0.1 * torch.randn(IN, IN, generator=generator)), weight


def _corrected(
    before: torch.Tensor,
    now: torch.Tensor,
    weight: torch.Tensor,
    share: float = 1.0,
    scale: torch.Tensor | None = None,
    states: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    eight_bit: bool = False,
) -> torch.Tensor:
    seen = CorrectionAccumulator(now.shape[1], CPU, dtype, scale, eight_bit=eight_bit)
    apart = [None] * 99 if states is None else states.split(150)
    for rows in zip(before.split(150), now.split(150), apart, strict=False):
        seen.add(*rows)
    (made,), damp = seen.corrected([weight], now.float().T @ now.float(), 1e-6, share)
    assert damp == 1e-6
    return made


def _exact(before: torch.Tensor, now: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The least squares weight in float64, and the share of the way to it that the halves of the text agree on: batches
    of 150 tokens, the first half of each and the rest."""
    x, change, wide = now.double(), (before - now).double(), weight.double()
    gram = x.T @ x
    halves = []
    for part in (0, 1):
        rows = torch.cat([batch.split(75)[part] for batch in torch.arange(len(x)).split(150)])
        halves.append(torch.linalg.solve(gram, x[rows].T @ change[rows] @ wide.T).T)
    outputs = [half @ torch.linalg.cholesky(gram) for half in halves]
    both = outputs[0] + outputs[1]
    return wide + sum(halves), float(4 * (outputs[0] * outputs[1]).sum() / both.square().sum())


def test_a_change_that_the_inputs_tell_is_made_up_for_whole() -> None:
    before, now, weight = _told()
    wanted = torch.linalg.lstsq(now.double(), before.double() @ weight.double().T).solution.T
    torch.testing.assert_close(_corrected(before, now, weight), wanted.float(), rtol=1e-3, atol=1e-3)


def test_as_much_is_taken_as_the_halves_of_the_text_agree_on() -> None:
    before, now, weight = _inputs()
    noisy = now + torch.randn(now.shape, generator=torch.Generator().manual_seed(5))
    whole, share = _exact(before, noisy, weight)
    assert 0.5 < share < 0.99
    wanted = weight + share * (whole.float() - weight)
    torch.testing.assert_close(_corrected(before, noisy, weight), wanted, rtol=1e-3, atol=1e-3)


def test_a_change_by_chance_moves_nothing() -> None:
    _, now, weight = _inputs()
    shares = []
    for seed in range(10, 20):
        before = now + torch.randn(now.shape, generator=torch.Generator().manual_seed(seed))
        whole, _ = _exact(before, now, weight)
        shares.append(float((_corrected(before, now, weight) - weight).norm() / (whole - weight).norm()))
    assert sum(shares) / 10 < 0.1, "least squares takes all of it"


def test_a_share_lies_between_the_weight_and_the_whole() -> None:
    before, now, weight = _inputs()
    whole = _corrected(before, now, weight)
    torch.testing.assert_close(_corrected(before, now, weight, share=0.25), weight + 0.25 * (whole - weight))
    torch.testing.assert_close(_corrected(now, now, weight), weight)


def test_linears_of_one_input_get_what_each_gets_alone() -> None:
    before, now, weight = _inputs()
    other = weight.flip(0, 1)[:7].contiguous()
    seen = CorrectionAccumulator(IN, CPU, torch.float32, None)
    for rows in zip(before.split(150), now.split(150), strict=True):
        seen.add(*rows)
    made, _ = seen.corrected([weight, other], now.T @ now, 1e-6, 1.0)
    for found, alone in zip(made, (weight, other), strict=True):
        torch.testing.assert_close(found, _corrected(before, now, alone))


def test_a_folded_scale_is_taken_out_of_the_unquantized_inputs_too() -> None:
    before, now, weight = _inputs()
    scale = torch.linspace(0.5, 2.0, IN)
    folded = _corrected(before, now / scale, weight * scale, scale=scale)
    torch.testing.assert_close(folded / scale, _corrected(before, now, weight), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["input", "change"])
def test_a_token_far_out_does_not_decide_for_the_others(which: str) -> None:
    before, now, weight = _inputs()
    alone = _corrected(before, now, weight)
    far_before, far_now = before.clone(), now.clone()
    generator = torch.Generator().manual_seed(1)
    far_before[7] = 300 * torch.randn(IN, generator=generator)
    if which == "input":
        far_now[7] = 200 * torch.randn(IN, generator=generator)
    whole = torch.linalg.lstsq(far_now.double(), far_before.double() @ weight.double().T).solution.T
    assert float((whole - alone).norm()) > 0.3 * float((alone - weight).norm()), "the token would decide"
    kept = _corrected(far_before, far_now, weight)
    assert float((kept - alone).norm()) < 0.05 * float((alone - weight).norm())


def test_half_precision_products_move_the_correction_by_little() -> None:
    before, now, weight = _inputs()
    whole = _corrected(before, now, weight)
    error = float((_corrected(before, now, weight, dtype=torch.bfloat16) - whole).norm())
    assert error < 0.02 * float((whole - weight).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [False, True])
def test_products_of_8_bit_integers_move_the_correction_by_little(dtype: torch.dtype, states: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    before = torch.randn(4500, 256, generator=generator) * torch.linspace(0.2, 3, 256)
    now = before @ (torch.eye(256) + 0.02 * torch.randn(256, 256, generator=generator))
    now += 0.05 * torch.randn(now.shape, generator=generator)
    now[1000] *= 300  # far out
    weight = torch.randn(40, 256, generator=generator)
    before, now = before.to(dtype), now.to(dtype)
    apart = (0.3 * now[:, :40] + 0.1 * torch.randn(4500, 40, generator=generator)).float() if states else None
    scale = torch.linspace(0.8, 1.2, 256)
    given = (before, (now / scale).to(dtype), weight * scale, 1.0, scale, apart)
    wanted = _corrected(given[0].float(), given[1].float(), *given[2:])
    found = _corrected(*given, eight_bit=True)
    assert float((found - wanted).norm()) < 0.02 * float((wanted - given[2]).norm())


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_batch_of_one_token_has_one_half_alone(eight_bit: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    before, now = torch.randn(2, 401, 256, generator=generator)
    weight = torch.randn(10, 256, generator=generator)
    seen = CorrectionAccumulator(256, CPU, torch.float32, None, eight_bit=eight_bit)
    for part in (slice(400), slice(400, 401)):
        seen.add(before[part], now[part])
    wanted = (before - now).T @ now
    torch.testing.assert_close(seen.totals()[0], wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()))
    alone = CorrectionAccumulator(256, CPU, torch.float32, None, eight_bit=eight_bit)
    alone.add(before[:1], now[:1])
    torch.testing.assert_close(alone.corrected([weight], now.T @ now, 0.01, 1.0)[0][0], weight)


def test_states_that_went_wrong_are_made_up_for_too() -> None:
    before, now, weight = _told()
    generator = torch.Generator().manual_seed(2)
    apart = now @ torch.randn(IN, OUT, generator=generator)
    aim = before.double() @ weight.double().T + apart.double()
    wanted = torch.linalg.lstsq(now.double(), aim).solution.T.float()
    torch.testing.assert_close(_corrected(before, now, weight, states=apart), wanted, rtol=1e-3, atol=1e-3)


def test_states_far_out_do_not_decide_for_the_others() -> None:
    before, now, weight = _inputs()
    apart = 0.1 * now[:, :OUT].clone()
    alone = _corrected(before, now, weight, states=apart)
    apart[7] = 1e4
    kept = _corrected(before, now, weight, states=apart)
    assert float((kept - alone).norm()) < 0.05 * float((alone - weight).norm())
