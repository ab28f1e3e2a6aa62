"""Predictions kept by their likeliest tokens, against all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.bench import predictions
from quantkit.bench.predictions import PredictionsFile, compare, predictions_of, write_predictions

VOCABULARY = 500


def _two(positions: int = 150, apart: float = 0.3) -> tuple[Tensor, Tensor]:
    """Log-probabilities as a language model's fall off, and others near them: float32 [positions, vocabulary]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(positions, VOCABULARY, generator=generator) * 3
    return logits.log_softmax(-1), (logits + apart * torch.randn(logits.shape, generator=generator)).log_softmax(-1)


def _whole(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(1), (p.exp() - q.exp()).abs().sum(1) / 2


def _following(p: Tensor) -> Tensor:
    return torch.arange(len(p)) % VOCABULARY


def test_a_vocabulary_kept_whole_gives_the_whole_divergence() -> None:
    p, q = _two()
    found = compare(predictions_of(p, _following(p)), q)
    kl, apart = _whole(p, q)
    torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.total_variation, apart, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.same_top, (p.argmax(1) == q.argmax(1)).double())


def test_the_likeliest_tokens_and_the_rest_give_a_little_less(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = _two()
    kl, apart = _whole(p, q)
    missed = []
    for top in (5, 50, 400):
        monkeypatch.setattr(predictions, "TOP", top)
        found = compare(predictions_of(p, _following(p)), q)
        assert bool((found.kl <= kl + 1e-5).all()) and bool((found.total_variation <= apart + 1e-5).all())
        missed.append(1 - float(found.kl.mean() / kl.mean()))
    assert missed[0] > missed[1] > missed[2]
    assert missed[1] < 0.1 and missed[2] < 0.002


def test_nothing_of_the_rest_is_lost_where_the_rest_keeps_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "TOP", 7)
    p, _ = _two()
    kept = p.topk(7, dim=1).indices
    other = p.scatter_add(1, kept, torch.linspace(-1, 1, 7).expand(len(p), 7)).log_softmax(-1)
    found = compare(predictions_of(p, _following(p)), other)
    kl, apart = _whole(p, other)
    torch.testing.assert_close(found.kl, kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.total_variation, apart, rtol=1e-3, atol=1e-5)


def test_total_variation_is_one_minus_the_acceptance_of_a_draft() -> None:
    p, q = _two()
    accepted = torch.minimum(p.exp(), q.exp()).sum(1)  # Leviathan et al. 2023, corollary 3.6
    found = compare(predictions_of(p, _following(p)), q)
    torch.testing.assert_close(1 - found.total_variation, accepted.double(), rtol=1e-4, atol=1e-5)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    p, q = _two(40)
    sequences = [predictions_of(one, _following(one)) for one in (p, q)]
    write_predictions(tmp_path / "kept", iter(sequences), 2)
    found = PredictionsFile(tmp_path / "kept")
    assert len(found) == 2 and found.vocabulary == VOCABULARY
    for row, one in enumerate(sequences):
        for name in PredictionsFile.NAMES:
            assert torch.equal(getattr(found.sequence(row), name), getattr(one, name))


def test_predictions_that_end_early_leave_nothing(tmp_path: Path) -> None:
    p, _ = _two(40)

    def broken() -> object:
        yield predictions_of(p, _following(p))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_predictions(tmp_path / "kept", broken(), 2)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_found_before_it_is_full(tmp_path: Path) -> None:
    p, _ = _two(40)
    with pytest.raises(OSError, match="do not fit"):
        write_predictions(tmp_path / "kept", iter([predictions_of(p, _following(p))]), 10**12)
    assert list(tmp_path.iterdir()) == []
