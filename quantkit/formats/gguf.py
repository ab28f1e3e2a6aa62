"""GGUF, read by llama.cpp: one file with tensors, architecture and tokenizer.

Source: llama.cpp, docs of the GGUF format and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, cast

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats.base import ArtifactSource, Format, LinearPlan, Writer
from quantkit.formats.gguf_metadata import file_metadata, model_name
from quantkit.formats.gguf_parity import put
from quantkit.formats.gguf_types import (
    DTYPE_TYPES,
    embedding_method,
    file_type_of,
    imatrix_metadata,
    substitutes_of,
    tensor_types,
    written_names,
)
from quantkit.formats.imatrix import Imatrix, write_imatrix
from quantkit.maths.ggml import FLOAT_TYPES, block_layout, encode, type_size
from quantkit.maths.gram import Importance
from quantkit.model.blocks import architecture_of, is_buffer
from quantkit.model.gguf_config import family_of_config, metadata_of_config
from quantkit.model.gguf_families import Family
from quantkit.model.gguf_file import DEFAULT_ALIGNMENT, MAGIC, TensorInfo
from quantkit.model.gguf_names import interleave, is_transposed, norm_offset, rotary_heads, to_gguf
from quantkit.model.gguf_rope import rope_tensors
from quantkit.model.gguf_source import GGUFSource
from quantkit.model.source import Source
from quantkit.tensors import BlockTensor, QuantizedTensor

_ROWS_AT_ONCE = 4096
"""Rows of an unquantized matrix that are encoded together: the temporary copies stay small beside the matrix."""


class GGUFWriter(Writer):
    """Writes header and tensor table at once, then each tensor at its place as it comes."""

    def __init__(self, folder: Path, source: Source, plans: list[LinearPlan], dtype: torch.dtype):
        self.config = source.config
        self.family = family_of_config(source.config)
        types = tensor_types(source, plans, dtype)
        file_type = file_type_of(plans) or DTYPE_TYPES[dtype]
        embedding = f"{architecture_of(source.config).embedding}.weight"
        metadata = file_metadata(source, source.shape(embedding)[0], file_type)
        self.substitutes = substitutes_of(source, plans)
        self.path = folder / f"{model_name(source)}-{file_type}.gguf"
        self._matrix_path = folder / f"{model_name(source)}.imatrix"
        self._weighing: dict[str, Importance] = {}
        self._weighed_by = [plan.method for plan in plans if plan.method is not None and plan.method.calibrated]
        metadata |= imatrix_metadata(source, plans, self._matrix_path.name)
        table = {
            name: (_gguf_name(name, self.family), self._stored_shape(name, source.shape(name)), types[name])
            for name in written_names(source)
        }
        factors = rope_tensors(source.config)
        table |= {name: (name, tuple(values.shape), "F32") for name, values in factors.items()}
        self._places: dict[str, TensorInfo] = {}
        self._file = self._begin(table, metadata)
        self._missing = {name: place.size for name, place in self._places.items()}  # bytes not written yet
        for name, values in factors.items():
            self._write(name, values)

    def _stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if is_transposed(name, len(shape), self.family) else shape

    def _begin(self, table: dict[str, tuple[str, tuple[int, ...], str]], metadata: dict[str, Any]) -> BinaryIO:
        """Header, metadata and tensor table; the file, as long as it will be at the end."""
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(self.path, self.family.architecture)
        for key, value in metadata.items():
            put(writer, key, value)
        offset = 0
        for name, (stored_name, shape, type_name) in table.items():
            row_bytes = type_size(type_name, shape[-1])
            size = row_bytes
            for count in shape[:-1]:
                size *= count
            kind = gguf.GGMLQuantizationType[type_name]
            writer.add_tensor_info(stored_name, (*shape[:-1], row_bytes), np.dtype(np.uint8), size, raw_dtype=kind)
            self._places[name] = TensorInfo(stored_name, shape, type_name, offset, size)
            offset += -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None, "open since the header was written"
        file = cast(BinaryIO, writer.fout[0])
        self._base = -(-file.tell() // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
        file.truncate(self._base + offset)  # padding is zeros
        return file

    def takes_parts(self, name: str) -> bool:
        if is_buffer(name):
            return True
        interleaved = self.family.interleaved and rotary_heads(name, self.config) is not None
        return not interleaved and not is_transposed(name, len(self._places[name].shape), self.family)

    def add(self, name: str, value: Tensor | QuantizedTensor, first_row: int = 0) -> int:
        if is_buffer(name):
            return 0
        place = self._places[name]
        if isinstance(value, BlockTensor):
            assert value.type_name == place.type_name, f"{name}: planned as {place.type_name}, got {value.type_name}"
            if value.importance is not None:
                self._weighing[place.name] = value.importance
        else:
            assert isinstance(value, Tensor), f"{name}: a {type(value).__name__} does not belong in GGUF"
        return self._write(name, value, first_row)

    def _write(self, name: str, value: Tensor | BlockTensor, first_row: int = 0) -> int:
        place = self._places[name]
        rows = value.data if isinstance(value, BlockTensor) else value
        heads = rotary_heads(name, self.config) if self.family.interleaved else None
        if heads is not None:
            rows = rows[interleave(heads, rows.shape[0])]
        offset = norm_offset(name, self.family)
        if offset:
            rows = rows.float() + offset
        if isinstance(value, Tensor) and is_transposed(name, value.dim(), self.family):
            rows = rows.T
        start = self._base + place.start + first_row * (place.size // max(1, place.shape[0]))
        self._file.seek(start)
        if isinstance(value, BlockTensor):
            self._file.write(rows.contiguous().numpy().data)
        else:
            matrix = rows.reshape(-1, place.shape[-1])
            for part in matrix.split(_ROWS_AT_ONCE):
                try:
                    data = encode(part, place.type_name)
                except ModelError as error:
                    raise ModelError(f"{name}: {error.message}", hint="--set method.embedding_type=bf16") from error
                self._file.write(data.numpy().data)
        written = self._file.tell() - start
        self._missing[name] -= written
        return written

    def finish(self) -> list[Path]:
        missing = sorted(name for name, left in self._missing.items() if left)
        assert not missing, f"not written as planned: {', '.join(missing)}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self._weighing:
            return [self.path]
        chunks, dataset = self._weighed_by[0].chunks, self._weighed_by[0].dataset
        length = max(entry.count for entry in self._weighing.values()) // chunks
        write_imatrix(self._matrix_path, Imatrix(self._weighing, (dataset,), chunks, length))
        return [self.path, self._matrix_path]


def _gguf_name(name: str, family: Family) -> str:
    found = to_gguf(name, family)
    assert found is not None, f"{name} has no GGUF name: misfits() reports it"
    return found


class GGUFArtifact(GGUFSource, ArtifactSource):
    """A GGUF file read back; `read` gives float32, which holds every decoded value exactly."""

    kind = "artifact"
    format_name = "gguf"

    def __init__(self, path: Path):
        super().__init__(path)
        self.notes = ()
        self.quantization = {"type": self.main_type, "types": self.stored_types()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        return self.decoded(name)

    def quantized(self, name: str) -> QuantizedTensor | None:
        info = self.info(name)
        if info.type_name in FLOAT_TYPES or len(info.shape) != 2:
            return None
        rows = self._ordered(name, self.file.raw(info.name))
        return BlockTensor(rows, info.type_name, info.shape[0], info.shape[1])

    def stored_bytes(self, name: str) -> int:
        return self.info(name).size


class GGUF(Format):
    """One .gguf file in the artifact's folder."""

    engines: ClassVar[tuple[str, ...]] = ("llama.cpp",)

    name: Literal["gguf"] = "gguf"

    def misfits(self, plans: list[LinearPlan], source: Source) -> list[str]:
        problems = [
            f"{plan.name}: method {plan.method.name} cannot be stored in GGUF; expected ggml"
            for plan in plans
            if plan.method is not None and plan.method.name != "ggml"
        ]
        if problems:
            return problems
        try:
            metadata_of_config(source.config)
        except ModelError as error:
            return [error.message]
        family = family_of_config(source.config)
        unknown = [name for name in written_names(source) if to_gguf(name, family) is None]
        problems += [f"{name}: has no name in GGUF for {source.config['architectures'][0]}" for name in unknown]
        embedding = f"{architecture_of(source.config).embedding}.weight"
        methods = [plan.method for plan in plans if plan.method is not None]
        kinds = sorted({method.embedding_type for method in methods if method.embedding_type is not None})
        if len(kinds) > 1:
            problems.append(f"method.embedding_type: overrides ask for {' and '.join(kinds)}; a file has one embedding")
        weighings = {str(method.importance) for method in methods if method.importance}
        if len(weighings) > 1:
            problems.append(
                "method.importance: overrides take it from several places; a file has one importance matrix"
            )
        if any(method.compensates for method in methods) and any(method.importance is True for method in methods):
            problems.append(
                "method.importance: overrides ask for true beside rounding gptq, which runs the quantized model; "
                "expected a file or false"
            )
        main = embedding_method(plans)
        if main is not None:
            _, kind = main.embedding_types(source, embedding)
            block, columns = block_layout(kind)[0], source.shape(embedding)[1]
            if columns % block:
                kind = kind.lower()
                problems.append(
                    f"{embedding}: embedding_type {kind}: its block of {block} does not divide {columns} columns"
                )
        return problems

    def writer(self, folder: Path, source: Source, plans: list[LinearPlan], dtype: Any) -> Writer:
        return GGUFWriter(folder, source, plans, dtype)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        file = _the_file(path)
        if file is None:
            return False
        with file.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC

    @classmethod
    def open(cls, path: Path) -> ArtifactSource:
        file = _the_file(path)
        if file is None:
            raise ModelError(f"{path}: expected a .gguf file, or a folder with exactly one")
        return GGUFArtifact(file)


def _the_file(path: Path) -> Path | None:
    """The .gguf file that a path is, or that the folder holds alone."""
    if path.is_dir():
        found = [item for item in path.iterdir() if item.suffix == ".gguf" and item.is_file()]
        return found[0] if len(found) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None
