"""What a model predicts on a text, kept small: the likeliest tokens of each position, and the rest as one event.

Divergences between such predictions and another model's are lower bounds of the whole ones, since telling fewer events
apart never makes two distributions look more different (the data processing inequality; Cover and Thomas, Elements of
Information Theory, 2006, section 2.8). docs/bench.md has what is lost on real text.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TOP = 4096
"""Tokens kept of each position; smaller vocabularies are kept whole."""

ROWS = 64
"""Positions compared at once: a block of log-probabilities stays in the cache of the processor."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of one sequence. tokens: int32 [positions, top], the likeliest. log_probs: float32 [positions, top].
    rest: float32 [positions], log of the probability of all other tokens together, -inf where there are none. losses:
    float64 [positions], -log of the probability of the token that follows."""

    tokens: Tensor
    log_probs: Tensor
    rest: Tensor
    losses: Tensor
    vocabulary: int


@dataclass(frozen=True)
class Divergence:
    """Position by position, float64 [positions]. kl: KL(reference || other) in nats. total_variation: half the sum of
    |p - q|. same_top: 1 where the likeliest token is the same."""

    kl: Tensor
    total_variation: Tensor
    same_top: Tensor


def predictions_of(log_probs: Tensor, following: Tensor) -> Predictions:
    """log_probs: float32 [positions, vocabulary]. following: int64 [positions], the tokens that came."""
    top = min(TOP, log_probs.shape[1])
    kept, tokens = log_probs.topk(top, dim=1)
    return Predictions(
        tokens.int(), kept, _rest(log_probs, tokens), losses_of(log_probs, following), log_probs.shape[1]
    )


def losses_of(log_probs: Tensor, following: Tensor) -> Tensor:
    """-log of the probability of each token that came: float64 [positions]."""
    return -log_probs.gather(1, following[:, None])[:, 0].double()


def compare(reference: Predictions, log_probs: Tensor) -> Divergence:
    """How another model's predictions, float32 log-probabilities [positions, vocabulary], part from the reference's."""
    parts = [
        _compare(*chunk)
        for chunk in zip(
            reference.tokens.long().split(ROWS),
            reference.log_probs.split(ROWS),
            reference.rest.split(ROWS),
            log_probs.split(ROWS),
            strict=True,
        )
    ]
    return Divergence(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def compare_whole(reference: Tensor, log_probs: Tensor) -> tuple[float, float]:
    """Mean KL(reference || other) in nats over the whole vocabulary, and the share of positions with the same likeliest
    token. Both: float32 log-probabilities [positions, vocabulary]."""
    kl = (reference.exp() * (reference - log_probs)).sum(1).double().mean()
    return float(kl), float((reference.argmax(1) == log_probs.argmax(1)).double().mean())


def _compare(tokens: Tensor, ours: Tensor, rest: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    theirs = log_probs.gather(1, tokens)
    other_rest = _rest(log_probs, tokens)
    p, q = ours.exp(), theirs.exp()
    p_rest, q_rest = rest.exp(), other_rest.exp()
    kl = (p * (ours - theirs)).sum(1).double()
    kl += torch.where(p_rest > 0, p_rest * (rest - other_rest), torch.zeros_like(rest)).double()
    total_variation = ((p - q).abs().sum(1) + (p_rest - q_rest).abs()).double() / 2
    return kl, total_variation, (tokens[:, 0] == log_probs.argmax(1)).double()


def _rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """log of the probability of all tokens but those named: float32 [positions]."""
    if tokens.shape[1] == log_probs.shape[1]:
        return torch.full((len(log_probs),), -torch.inf)
    return log_probs.scatter(1, tokens, -torch.inf).logsumexp(1)


class PredictionsFile:
    """The predictions of every sequence of a text: a folder of arrays, mapped when read.

    path: the folder. Raises OSError or ValueError when it is not there or damaged.
    """

    NAMES = ("tokens", "log_probs", "rest", "losses")

    def __init__(self, path: Path):
        arrays = [np.load(path / f"{name}.npy", mmap_mode="c") for name in self.NAMES]  # torch wants memory to write to
        self.tokens, self.log_probs, self.rest, self.losses = arrays
        self.vocabulary = int(np.load(path / "vocabulary.npy"))

    def __len__(self) -> int:
        return len(self.tokens)

    def sequence(self, row: int) -> Predictions:
        """The predictions of one sequence."""
        arrays = (self.tokens[row], self.log_probs[row], self.rest[row], self.losses[row])
        tokens, log_probs, rest, losses = map(torch.from_numpy, arrays)
        return Predictions(tokens, log_probs, rest, losses, self.vocabulary)


def write_predictions(path: Path, sequences: Iterable[Predictions], count: int) -> None:
    """Keep the predictions of `count` sequences where PredictionsFile finds them, one at a time: whole, or not there.

    Raises OSError when the disk has no room for them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=".partial-"))
    arrays: dict[str, np.memmap] = {}
    try:
        for row, one in enumerate(sequences):
            values = {name: getattr(one, name).numpy() for name in PredictionsFile.NAMES}
            if not row:
                _check_space(partial, count * sum(value.nbytes for value in values.values()))
                np.save(partial / "vocabulary.npy", np.int64(one.vocabulary))
                for name, value in values.items():
                    shape = (count, *value.shape)
                    arrays[name] = np.lib.format.open_memmap(partial / f"{name}.npy", "w+", value.dtype, shape)
            for name, value in values.items():
                arrays[name][row] = value
        for array in arrays.values():
            array.flush()
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(28, f"{needed} bytes of log-probabilities do not fit in {free} free bytes", str(folder))
