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


def _corrected(
    before: torch.Tensor, now: torch.Tensor, weight: torch.Tensor, share: float = 1.0, scale: torch.Tensor | None = None
) -> torch.Tensor:
    seen = CorrectionAccumulator(IN, CPU, torch.float32, scale)
    for rows in zip(before.split(150), now.split(150), strict=True):
        seen.add(*rows)
    return seen.corrected(weight, now.T @ now, 1e-6, share)


def test_the_whole_correction_is_the_least_squares_weight() -> None:
    before, now, weight = _inputs()
    wanted = torch.linalg.lstsq(now.double(), before.double() @ weight.double().T).solution.T
    torch.testing.assert_close(_corrected(before, now, weight), wanted.float(), rtol=1e-3, atol=1e-4)


def test_a_share_lies_between_the_weight_and_the_whole() -> None:
    before, now, weight = _inputs()
    whole = _corrected(before, now, weight)
    torch.testing.assert_close(_corrected(before, now, weight, share=0.25), weight + 0.25 * (whole - weight))
    torch.testing.assert_close(_corrected(now, now, weight), weight)


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
    seen = CorrectionAccumulator(IN, CPU, torch.bfloat16, None)
    seen.add(before, now)
    whole = _corrected(before, now, weight)
    error = float((seen.corrected(weight, now.T @ now, 1e-6, 1.0) - whole).norm())
    assert error < 0.02 * float((whole - weight).norm())


def test_states_that_went_wrong_are_made_up_for_too() -> None:
    before, now, weight = _inputs()
    generator = torch.Generator().manual_seed(2)
    apart = now @ torch.randn(IN, OUT, generator=generator) + 0.1 * torch.randn(TOKENS, OUT, generator=generator)
    seen = CorrectionAccumulator(IN, CPU, torch.float32, None)
    for rows in zip(before.split(150), now.split(150), apart.split(150), strict=True):
        seen.add(*rows)
    aim = before.double() @ weight.double().T + apart.double()
    wanted = torch.linalg.lstsq(now.double(), aim).solution.T.float()
    torch.testing.assert_close(seen.corrected(weight, now.T @ now, 1e-6, 1.0), wanted, rtol=1e-3, atol=1e-3)


def test_states_far_out_do_not_decide_for_the_others() -> None:
    before, now, weight = _inputs()
    seen = CorrectionAccumulator(IN, CPU, torch.float32, None)
    apart = 0.1 * now[:, :OUT].clone()
    apart[7] = 1e4
    seen.add(before, now, apart)
    keep = torch.arange(TOKENS) != 7
    alone = CorrectionAccumulator(IN, CPU, torch.float32, None)
    alone.add(before[keep], now[keep], apart[keep])
    wanted = alone.corrected(weight, now[keep].T @ now[keep], 1e-6, 1.0)
    torch.testing.assert_close(seen.corrected(weight, now.T @ now, 1e-6, 1.0), wanted, rtol=1e-3, atol=1e-3)
