"""What the metrics of one worker share: the subject, its sessions, and where the baseline left its numbers."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit.bench.subject import Artifact, Baseline, Subject, Unavailable
from quantkit.engines import Session
from quantkit.engines.base import dtype_name, quality_dtype
from quantkit.environment import rss_bytes
from quantkit.manifest import WEIGHT_FILES
from quantkit.memory import trim
from quantkit.model.reader import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Run:
    """One subject on one device.

    scratch: the folder in which the baseline leaves its predictions. tokenizer_folder: the source's. baseline: its
    folder or file. samples: scores of each question by task, for Row.samples. load_s: seconds from the file to an
    engine that is ready to serve, libraries imported and the file read once before.
    """

    subject: Subject
    is_baseline: bool
    device: torch.device
    scratch: Path
    tokenizer_folder: Path
    baseline: Path | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    imports_rss: int = 0
    loaded_rss: int | None = None
    load_s: float | None = None
    _session: Session | None = None
    _unavailable: str | None = None

    def prepare(self) -> None:
        """Import the libraries and note what they take."""
        self.subject.prepare()
        # the first product starts the threads and makes the buffers of torch's own libraries
        torch.nn.functional.linear(torch.ones(8, 64), torch.ones(64, 64))
        self.imports_rss = settled_rss()

    def speed(self) -> Session:
        """The session for speed, loaded and run once when first asked for. Raises Unavailable."""
        if self._unavailable is not None:
            raise Unavailable(self._unavailable)
        if self._session is None or self.loaded_rss is None:
            self.close()
            read_ahead(weight_files(self.subject.source.path))
            started = time.perf_counter()
            try:
                self._session = self.subject.for_speed(self.device)
            except Unavailable as error:
                self._unavailable = str(error)
                raise
            # some engines rearrange weights in the first pass: only now is it ready to serve
            self._session.prefill(torch.ones(1, 8, dtype=torch.int64))
            self.load_s = time.perf_counter() - started
            self.loaded_rss = settled_rss()
        return self._session

    def quality(self) -> Session:
        """The session whose logits all measures of quality are made from; that for speed when it computes in the same
        dtype."""
        held = self._session
        wanted = dtype_name(self.quality_dtype())
        if held is None or (held.model is not None and held.dtype != wanted):
            self.close()
            self._session = self.subject.for_quality(self.device)
        assert self._session is not None
        return self._session

    def quality_dtype(self) -> torch.dtype:
        """The dtype that measures of quality are computed in."""
        return quality_dtype(self.device, self.subject.stored_dtype())

    def in_dtype(self, dtype: torch.dtype) -> Session:
        """A session of the baseline in this dtype; it takes the place of the one that was held."""
        assert isinstance(self.subject, Baseline)
        self.close()
        self._session = self.subject.in_dtype(self.device, dtype)
        return self._session

    @contextmanager
    def beside_baseline(self) -> Iterator[tuple[PreTrainedModel, Session]]:
        """The baseline's model and a session of the artifact with a transformers model, both for speed: the only time
        that two models are side by side."""
        assert self.baseline is not None and isinstance(self.subject, Artifact)
        self.close()
        source = open_source(str(self.baseline))
        target = Baseline(source)
        held = target.for_speed(self.device)
        session = self.subject.as_transformers(self.device)
        try:
            assert held.model is not None
            yield held.model, session
        finally:
            session.close()
            held.close()
            gc.collect()

    def close(self) -> None:
        """Drop the session: models are not side by side."""
        if self._session is not None:
            self._session.close()
            self._session = None
            gc.collect()


def weight_files(path: Path) -> list[Path]:
    """The files of a model or an artifact that hold weights."""
    return [path] if path.is_file() else sorted(item for item in path.iterdir() if item.suffix in WEIGHT_FILES)


def read_ahead(paths: Sequence[Path]) -> None:
    """Read files through once, so that the time to load them does not depend on what else was read before."""
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def settled_rss() -> int:
    """Resident bytes after what was freed has gone back to the system."""
    gc.collect()
    trim()
    return rss_bytes()
