"""A GGUF file as a source: tensors decoded one at a time, in Hugging Face names and row order, with their config."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.gguf_config import config_of_file, family_of_architecture
from quantkit.model.gguf_file import GGUFFile, TensorInfo
from quantkit.model.gguf_losses import loss_notes
from quantkit.model.gguf_names import (
    CONFIG_TENSORS,
    deinterleave,
    file_order,
    is_transposed,
    norm_offset,
    rotary_heads,
    to_hf,
)
from quantkit.model.gguf_tokenizer import write_tokenizer_files
from quantkit.model.hub import HUB_ID
from quantkit.model.sequences import explained_tokenizer
from quantkit.model.source import Source

TOKENIZER_VERSION = 1
"""Raised when `write_tokenizer_files` writes something else, so that files in the cache are made again."""

_CARD_KEYS = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
}
"""Key of a model card -> that of a GGUF file behind "general."."""

_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFSource(Source):
    """Any GGUF file of a family in the table, whatever its types.

    `read` gives the dtype that most linears are stored in, float16 when they are quantized. notes says what
    quantization the file had already been through. Raises ModelError when the file is damaged or not supported.
    """

    kind = "gguf"

    def __init__(self, path: Path):
        self.path = path
        self.file = GGUFFile(path)
        parts = self.file.metadata.get("split.count", 1)
        if parts > 1:
            raise ModelError(
                f"{path}: is one of {parts} parts; expected a whole model in one file",
                hint="join them with llama-gguf-split --merge",
            )
        self.family = family_of_architecture(self.file)
        self._infos = self._named_tensors()
        self._names = sorted(self._infos, key=lambda name: file_order(name, self.family))
        types = self._linear_types()
        self.main_type = types.most_common(1)[0][0] if types else "F32"
        self._dtype = _FLOAT_DTYPES.get(self.main_type, torch.float16)
        self.config = config_of_file(self.file, self._dtype)
        self.notes = loss_notes(self._infos.values(), self.main_type, self.file.metadata)
        self._overflows: dict[str, bool] = {}
        self._sha256: str | None = None
        self._hashing = Lock()

    def _named_tensors(self) -> dict[str, TensorInfo]:
        infos, unknown = {}, []
        for name, info in self.file.tensors.items():
            hf_name = to_hf(name, self.family)
            if hf_name is not None:
                infos[hf_name] = info
            elif name not in CONFIG_TENSORS:
                unknown.append(name)
        if unknown:
            shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
            raise ModelError(
                f"{self.path}: {len(unknown)} tensors are not those of a plain {self.family.architecture}: {shown}",
                hint="mixtures of experts and adapters are not supported",
            )
        return infos

    def _linear_types(self) -> Counter[str]:
        """How many linears of the blocks are stored in each type."""
        inside = [info for info in self._infos.values() if info.name.startswith("blk.") and len(info.shape) == 2]
        return Counter(info.type_name for info in inside)

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies, by its Hugging Face name. Raises ModelError when there is none."""
        if name not in self._infos:
            raise ModelError(f"{self.path}: holds no tensor {name}")
        return self._infos[name]

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.info(name).shape
        return shape[::-1] if is_transposed(name, len(shape), self.family) else shape

    def dtype(self, name: str) -> torch.dtype:
        info = self.info(name)
        if self._dtype != torch.float16 or len(info.shape) > 1 or info.type_name == "F16":
            return self._dtype
        if name not in self._overflows:
            # a norm or bias of a few thousand values: looking is as cheap as a header
            values = self.file.decoded(info.name)
            self._overflows[name] = bool(values.abs().max() > torch.finfo(torch.float16).max)
        return torch.float32 if self._overflows[name] else self._dtype

    def decoded(self, name: str) -> Tensor:
        """The tensor as float32, in Hugging Face row order."""
        values = self._ordered(name, self.file.decoded(self.info(name).name))
        offset = norm_offset(name, self.family)
        if is_transposed(name, values.dim(), self.family):
            return values.T.contiguous()
        return values - offset if offset else values

    def read(self, name: str) -> Tensor:
        return self._typed(name, self.decoded(name))

    def in_parts(self, name: str, rows: int) -> Iterator[Tensor]:
        info = self.info(name)
        reordered = self.family.interleaved and rotary_heads(name, self.config) is not None
        if len(info.shape) < 2 or reordered or is_transposed(name, len(info.shape), self.family):
            yield from super().in_parts(name, rows)
            return
        for first in range(0, info.shape[0], rows):
            yield self._typed(name, self.file.decoded(info.name, slice(first, first + rows)))

    def _typed(self, name: str, values: Tensor) -> Tensor:
        """Values of a tensor in the dtype that `read` gives. Raises ModelError when they do not fit it."""
        dtype = self.dtype(name)
        largest = float(values.abs().max()) if dtype == torch.float16 else 0.0
        # infinity in the file itself is left for the method, which names the tensor
        if torch.finfo(torch.float16).max < largest < math.inf:
            raise ModelError(
                f"{self.path}: {name}: values up to {largest:.3g} do not fit float16, whose largest is 65504",
                hint="take the model as a BF16 or F32 file, or as a Hugging Face folder",
            )
        return values.to(dtype)

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor, values or bytes, from the file's order to that of Hugging Face."""
        heads = rotary_heads(name, self.config) if self.family.interleaved else None
        return rows if heads is None else rows[deinterleave(heads, rows.shape[0])]

    def tokenizer_folder(self) -> Path:
        from quantkit.resources import cache_folder

        status = self.path.stat()
        identity = f"{TOKENIZER_VERSION}|{self.path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        parent = cache_folder() / "gguf-tokenizers"
        folder = parent / hashlib.sha256(identity.encode()).hexdigest()[:32]
        if folder.is_dir():
            return folder
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
        try:
            length = int(self.config[self.family.context_key])
            with explained_tokenizer(f"{self.path}: its tokenizer cannot be built"):
                write_tokenizer_files(self.file.metadata, partial, str(self.path), length)
            try:
                os.rename(partial, folder)
            except OSError:
                if not folder.is_dir():  # another process may have been first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def side_files(self) -> list[Path]:
        return sorted(path for path in self.tokenizer_folder().iterdir() if path.is_file())

    def card(self) -> dict[str, Any]:
        metadata = self.file.metadata
        said = {key: metadata.get(f"general.{name}") for key, name in _CARD_KEYS.items()}
        found = {key: value for key, value in said.items() if value}
        for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url"):
            repository = str(metadata.get(key) or "").removeprefix("https://huggingface.co/").rstrip("/")
            if HUB_ID.fullmatch(repository):
                return {"base_model": repository, **found}
        return found

    def lineage(self) -> dict[str, Any]:
        with self._hashing:  # a run hashes ahead in another thread
            if self._sha256 is None:
                with self.path.open("rb") as file:
                    self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        entry = {"name": self.path.name, "bytes": self.path.stat().st_size, "sha256": self._sha256}
        return {
            "kind": self.kind,
            "id": self.path.name,
            "revision": None,
            "files": [entry],
            "types": self.stored_types(),
        }

    def stored_types(self) -> dict[str, int]:
        """How many tensors the file stores in each ggml type."""
        return dict(sorted(Counter(info.type_name for info in self._infos.values()).items()))
