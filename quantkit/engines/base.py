"""What an engine is: something that runs an artifact, and the few primitives that metrics are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.device import multiplies_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROOM = 256
"""Tokens that a sequence may grow beyond its prompt where nobody says how many."""


class Session(ABC):
    """A model that an engine has loaded.

    engine: its name, as measurements carry it. dtype: what activations are computed in. model: the transformers model
    inside, None when the engine has no such thing. details: what else a reader of the numbers must know; it goes into
    the settings of every measurement.
    """

    engine: str
    dtype: str
    model: PreTrainedModel | None = None
    details: dict[str, Any]

    @abstractmethod
    def logits(self, ids: Tensor, last: int | None = None) -> Tensor:
        """The logits after each of the last tokens of one sequence, of all when None: float32 [last, vocabulary].

        ids: int64 [n]. Every measure of quality is made from these, whoever computes them.
        """

    @abstractmethod
    def prefill(self, ids: Tensor, room: int = ROOM) -> Tensor:
        """Read prompts int64 [batch, length] into an empty cache; the likeliest next token of each, int64 [batch].

        room: tokens that `decode` may add to each. Returns when the work is done, not when it is queued.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each prompt of `prefill`: int64 [batch]; the likeliest next ones, int64 [batch]."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; the session cannot be used afterwards."""


class Engine(ABC):
    """Loads artifacts of some formats. name: as `Format.engines` has it."""

    name: str

    @abstractmethod
    def available(self) -> str | None:
        """None when it can run here; else why not and what to install."""

    @abstractmethod
    def prepare(self) -> None:
        """Import what `load` needs, so that the memory of the libraries can be told from that of the model."""

    @abstractmethod
    def load(self, path: Path, device: torch.device, dtype: torch.dtype) -> Session:
        """Load an artifact; `dtype` is what unquantized weights and activations get where the engine leaves a choice.

        Raises ModelError when the engine refuses the artifact, MissingDependencyError when it is not installed.
        """


def speed_dtype(device: torch.device, source_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of half-precision weights runs best on a device.

    A GPU: the weights' own. A CPU: bfloat16 where it has units for it, else float32, because half-precision products
    are then emulated and several times slower.
    """
    half = source_dtype if source_dtype in (torch.float16, torch.bfloat16) else None
    if device.type != "cpu":
        return half or torch.float16
    return torch.bfloat16 if half is not None and multiplies_bfloat16() else torch.float32


def quality_dtype(device: torch.device, source_dtype: torch.dtype) -> torch.dtype:
    """The dtype of perplexity, divergence and accuracy: float32 on a CPU, half precision on a GPU."""
    half = source_dtype if source_dtype in (torch.float16, torch.bfloat16) else torch.float16
    return torch.float32 if device.type == "cpu" else half


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float16"."""
    return str(dtype).removeprefix("torch.")
