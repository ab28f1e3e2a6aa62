"""What a worker measures: the baseline or one artifact, and how it is loaded for speed and for quality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path

import torch

from quantkit.engines import DECODED, ENGINES, Engine, Session
from quantkit.engines.base import quality_dtype, speed_dtype
from quantkit.engines.transformers import TransformersSession
from quantkit.errors import QuantkitError
from quantkit.formats import FORMATS, open_artifact
from quantkit.formats.base import ArtifactSource
from quantkit.model.blocks import architecture_of, blocks_of
from quantkit.model.load import load_transformers
from quantkit.model.reader import open_source
from quantkit.model.source import Source


class Unavailable(Exception):  # noqa: N818  # not an error: the answer to a question
    """There is no number, and this is why."""


class Subject(ABC):
    """One model at rest and how to run it. notes: what happened that a reader of the numbers must know."""

    source: Source

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def prepare(self) -> None:
        """Import what loading needs, so that the memory of the libraries can be told from that of the model."""

    @abstractmethod
    def for_speed(self, device: torch.device) -> Session:
        """A session of the engine this is for, in the dtype that is fastest. Raises Unavailable."""

    @abstractmethod
    def for_quality(self, device: torch.device) -> Session:
        """A session in the dtype of quality; its engine names who computes the logits."""

    @abstractmethod
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the unquantized matrices; float16 when there are none."""

    def linears(self) -> list[str]:
        """Weight names of the linears: those of the blocks, and the head where it is stored."""
        names = [f"{linear}.weight" for block in blocks_of(self.source) for linear in block.linears]
        head = f"{architecture_of(self.source.config).head}.weight"
        return names if self.source.tied_head else [*names, head]


class Baseline(Subject):
    """The unquantized model, in transformers."""

    def __init__(self, source: Source):
        super().__init__()
        self.source = source

    def prepare(self) -> None:
        DECODED.prepare()

    def stored_dtype(self) -> torch.dtype:
        counts = Counter(self.source.dtype(name) for name in self.linears())
        return counts.most_common(1)[0][0]

    def for_speed(self, device: torch.device) -> Session:
        return self._load(device, speed_dtype(device, self.stored_dtype()))

    def for_quality(self, device: torch.device) -> Session:
        return self._load(device, quality_dtype(device, self.stored_dtype()))

    def _load(self, device: torch.device, dtype: torch.dtype) -> Session:
        # opened again, so that what is mapped while loading is let go and does not count as the model's memory
        source = open_source(str(self.source.path))
        return TransformersSession(load_transformers(source, dtype, device), "transformers")


class Artifact(Subject):
    """A quantized model, in the first engine of its format that is installed.

    without_engine: why none may be used, such as that it ended the process before; None when it may.
    """

    source: ArtifactSource

    def __init__(self, path: Path, without_engine: str | None = None):
        super().__init__()
        self.path = path
        self.source = open_artifact(path)
        self._engine: Engine | None = None
        self._reason = without_engine or ""
        if without_engine is None:
            self._engine, self._reason = _choose(self.source.format_name)

    def prepare(self) -> None:
        (self._engine or DECODED).prepare()

    def stored_dtype(self) -> torch.dtype:
        linears = set(self.linears())
        names = [name for name in self.source.names() if name not in linears and len(self.source.shape(name)) == 2]
        counts = Counter(self.source.dtype(name) for name in names)
        return counts.most_common(1)[0][0] if counts else torch.float16

    def for_speed(self, device: torch.device) -> Session:
        return self._load(device, speed_dtype(device, self.stored_dtype()))

    def for_quality(self, device: torch.device) -> Session:
        dtype = quality_dtype(device, self.stored_dtype())
        try:
            return self._load(device, dtype)
        except Unavailable as error:
            session = DECODED.load(self.path, device, dtype)
            session.details["without_engine"] = str(error)
            return session

    def _load(self, device: torch.device, dtype: torch.dtype) -> Session:
        if self._engine is None:
            raise Unavailable(self._reason)
        try:
            return self._engine.load(self.path, device, dtype)
        except QuantkitError as error:
            self._reason, self._engine = error.message, None
            self.notes.append(error.message)
            raise Unavailable(error.message) from error


def _choose(format_name: str) -> tuple[Engine | None, str]:
    """The first engine of a format that is installed, else why there is none."""
    reasons = []
    for name in FORMATS[format_name].engines:
        reason = ENGINES[name].available()
        if reason is None:
            return ENGINES[name], ""
        reasons.append(f"{name} is not installed: {reason}")
    return None, "; ".join(reasons) or f"no engine of quantkit runs the format {format_name}"
