"""What the metrics of one worker share: the subject, its sessions, and where the baseline left its numbers."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantkit.bench.subject import Subject, Unavailable
from quantkit.engines import Session
from quantkit.engines.base import dtype_name, quality_dtype


@dataclass
class Run:
    """One subject on one device.

    scratch: the folder in which the baseline leaves its log-probabilities. tokenizer_folder: the source's. samples:
    scores of each question by task, for Row.samples.
    """

    subject: Subject
    is_baseline: bool
    device: torch.device
    scratch: Path
    tokenizer_folder: Path
    samples: dict[str, list[float]] = field(default_factory=dict)
    imports_rss: int = 0
    loaded_rss: int | None = None
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
            try:
                self._session = self.subject.for_speed(self.device)
            except Unavailable as error:
                self._unavailable = str(error)
                raise
            # some engines rearrange weights in the first pass: only now is it ready to serve
            self._session.prefill(torch.ones(1, 8, dtype=torch.int64))
            self.loaded_rss = settled_rss()
        return self._session

    def quality(self, *, model: bool = False) -> Session:
        """The session for quality; that for speed when it computes in the same dtype."""
        held = self._session
        wanted = dtype_name(quality_dtype(self.device, self.subject.stored_dtype()))
        fits = held is not None and (held.model is not None or not model)
        if held is None or not fits or (held.model is not None and held.dtype != wanted):
            self.close()
            self._session = self.subject.for_quality(self.device, model=model)
        assert self._session is not None
        return self._session

    def close(self) -> None:
        """Drop the session: models are never side by side."""
        if self._session is not None:
            self._session.close()
            self._session = None
            gc.collect()


def rss() -> int:
    """Resident bytes of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def settled_rss() -> int:
    """Resident bytes after what was freed has gone back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return rss()


def peak_rss() -> int:
    """The most resident bytes this process has had.

    On Linux from the process's own memory map: what getrusage tells there starts with the memory of the parent process.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    from quantkit.environment import peak_rss_bytes

    return peak_rss_bytes()
