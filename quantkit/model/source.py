"""The one way the rest of quantkit reads a model: named tensors, a config and side files, all lazy.

A Hugging Face folder, a GGUF file and a finished artifact are all a Source; so the engine that quantizes and the bench
that measures decoded weights read alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PART = 1 << 20
"""Values of each part of a tensor that goes through in parts: float32 copies stay in the processor's outer cache, and
the C library gives the next part the memory of the last one, where it would fetch fresh pages for larger ones, which
takes longer than the arithmetic."""


class Source(ABC):
    """A causal language model at rest.

    kind: "safetensors", "gguf" or "artifact". path: the folder or file. config: the Hugging Face config.json as a dict,
    without quantization_config. notes: what a reader of results must know of it, such as "dequantized Q4_1 baseline".
    """

    kind: str
    path: Path
    config: dict[str, Any]
    notes: tuple[str, ...] = ()
    trust_remote_code: bool = False
    """Whether code that lies beside the model may be run, as a user said; a tokenizer may need it."""

    @abstractmethod
    def names(self) -> list[str]:
        """Hugging Face names of the stored tensors, in a stable order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype that `read` will give, from the header alone."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU; a block-quantized one comes decoded. Raises ModelError when damaged."""

    def in_parts(self, name: str, rows: int) -> Iterator[Tensor]:
        """The tensor so many rows of its first axis at a time, in order; where the file allows it, no more is held."""
        yield from self.read(name).split(rows)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix, int64 ascending; where the file allows it, little more is held than they take.

        Raises IndexError when one is beyond the last.
        """
        count, width = self.shape(name)
        if len(rows) and int(rows[-1]) >= count:
            raise IndexError(f"{name}: row {int(rows[-1])} of {count}")
        found, start = [], 0
        for part in self.in_parts(name, max(1, PART // width)):
            own = rows[(rows >= start) & (rows < start + len(part))]
            found.append(part[own - start])
            start += len(part)
        return torch.cat(found)

    @abstractmethod
    def tokenizer_folder(self) -> Path:
        """A folder that transformers' AutoTokenizer loads; a GGUF source makes it on first use in the cache."""

    @abstractmethod
    def side_files(self) -> list[Path]:
        """Files an artifact carries on unaltered: tokenizer, generation config, chat template, licence; not
        config.json."""

    @abstractmethod
    def lineage(self) -> dict[str, Any]:
        """Where this came from: kind, id or path name, revision, and each weight file with bytes and sha256."""

    def weight_paths(self) -> list[Path]:
        """The files that the tensors are in."""
        return [self.path]

    def card(self) -> dict[str, Any]:
        """What the source's own model card says of it, such as license and language, as the front matter on a hub;
        base_model is the source's own id there. Empty when nothing is known."""
        return {}

    @property
    def tied_head(self) -> bool:
        """Whether lm_head is the embedding matrix and no tensor of its own is stored."""
        return bool(self.config.get("tie_word_embeddings")) or "lm_head.weight" not in self.names()

    def parameter_count(self) -> int:
        """Number of stored parameters."""
        total = 0
        for name in self.names():
            count = 1
            for size in self.shape(name):
                count *= size
            total += count
        return total
