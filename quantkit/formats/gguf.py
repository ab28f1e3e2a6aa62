"""GGUF, read by llama.cpp: one file with tensors, architecture and tokenizer.

Source: llama.cpp, docs of the GGUF format and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

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
from quantkit.formats.layout import ArtifactLayout
from quantkit.formats.safetensors_shard import lost
from quantkit.maths.ggml import FLOAT_TYPES, HALF_PLACES, block_layout, encode, type_size
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
    """Writes header and tensor table at once, then each tensor at its place as it comes.

    types: ggml's type of every tensor that is written, by its Hugging Face name. file_type: that of most linears, or
    the mix. plans: of the methods that choose the codes; empty where they were chosen before. name: of the file, else
    it is called after the model and its type.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        types: Mapping[str, str],
        file_type: str,
        plans: list[LinearPlan],
        name: str | None = None,
    ):
        self.config = source.config
        self.family = family_of_config(source.config)
        embedding = f"{architecture_of(source.config).embedding}.weight"
        metadata = file_metadata(source, source.shape(embedding)[0], file_type)
        self.substitutes = substitutes_of(source, plans)
        names = _file_names(source, file_type)
        self.path, self._matrix_path = folder / (name or names[0]), folder / names[1]
        self._weighing: dict[str, Importance] = {}
        self._weighed_by = [plan.method for plan in plans if plan.method is not None and plan.method.calibrated]
        metadata |= imatrix_metadata(source, plans, self._matrix_path.name)
        self._places = tensor_table(source, types)
        self._file = self._begin(metadata)
        self._missing = {name: place.size for name, place in self._places.items()}  # bytes not written yet
        self._added: list[str] = []  # since the last checkpoint
        for name, values in rope_tensors(source.config).items():
            self._write(name, values)

    def _begin(self, metadata: dict[str, Any]) -> BinaryIO:
        """Header, metadata and tensor table; the file, as long as it will be at the end. What tensors of an earlier
        writer lie in it stays."""
        import gguf
        import numpy as np

        beside = self.path.with_name(f".{self.path.name}.header")
        writer = gguf.GGUFWriter(beside, self.family.architecture)
        for key, value in metadata.items():
            put(writer, key, value)
        end = 0
        for info in self._places.values():
            stored = (*info.shape[:-1], type_size(info.type_name, info.shape[-1]))
            kind = gguf.GGMLQuantizationType[info.type_name]
            writer.add_tensor_info(info.name, stored, np.dtype(np.uint8), info.size, raw_dtype=kind)
            end = info.start + _padded(info.size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        self._found_bytes = self.path.stat().st_size if self.path.exists() else 0
        file = self.path.open("r+b" if self._found_bytes else "w+b")
        file.write(beside.read_bytes())
        beside.unlink()
        self._base = _padded(file.tell())
        file.truncate(self._base + end)  # padding is zeros
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
        if not self._missing[name]:
            self._added.append(name)
        return written

    def checkpoint(self) -> dict[str, Any]:
        self._sync()
        added, self._added = self._added, []
        weighing = {}
        for name in added:
            entry = self._weighing.get(self._places[name].name)
            if entry is not None:
                squares = entry.squares.float().cpu().numpy().tobytes()
                weighing[self._places[name].name] = [base64.b64encode(squares).decode(), entry.count]
        return {"added": added, "weighing": weighing}

    def restore(self, checkpoints: Sequence[Mapping[str, Any]]) -> None:
        if self._found_bytes < self._file.seek(0, os.SEEK_END):
            raise lost(self.path)
        for checkpoint in checkpoints:
            self._missing |= dict.fromkeys(checkpoint["added"], 0)
            for name, (squares, count) in checkpoint["weighing"].items():
                values = torch.frombuffer(bytearray(base64.b64decode(squares)), dtype=torch.float32)
                self._weighing[name] = Importance(values, count)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file, complete or not."""
        self._file.close()

    def finish(self) -> list[Path]:
        missing = sorted(name for name, left in self._missing.items() if left)
        assert not missing, f"not written as planned: {', '.join(missing)}"
        self._sync()
        self.close()
        if not self._weighing:
            return [self.path]
        chunks, dataset = self._weighed_by[0].chunks, self._weighed_by[0].dataset
        length = max(entry.count for entry in self._weighing.values()) // chunks
        write_imatrix(self._matrix_path, Imatrix(self._weighing, (dataset,), chunks, length))
        return [self.path, self._matrix_path]


def unwritable(source: Source) -> list[str]:
    """Every reason why GGUF cannot say what a model is, whatever the types of its tensors; one line each."""
    try:
        metadata_of_config(source.config)
    except ModelError as error:
        return [error.message]
    family = family_of_config(source.config)
    unknown = [name for name in written_names(source) if to_gguf(name, family) is None]
    return [f"{name}: has no name in GGUF for {source.config['architectures'][0]}" for name in unknown]


def tensor_table(source: Source, types: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Where each tensor will lie behind the header, by its name in the source, in the order of the file."""
    family = family_of_config(source.config)
    table: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for name in written_names(source):
        shape = source.shape(name)
        turned = is_transposed(name, len(shape), family)
        table[name] = (_gguf_name(name, family), shape[::-1] if turned else shape, types[name])
    table |= {name: (name, tuple(values.shape), "F32") for name, values in rope_tensors(source.config).items()}
    places, start = {}, 0
    for name, (stored_name, shape, type_name) in table.items():
        size = prod(shape[:-1]) * type_size(type_name, shape[-1])
        places[name] = TensorInfo(stored_name, shape, type_name, start, size)
        start += _padded(size)
    return places


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


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

    def problems(self, name: str) -> list[str]:
        info = self.info(name)
        if info.type_name in FLOAT_TYPES or info.type_name not in HALF_PLACES:
            values = self.file.decoded(info.name)
            odd = not bool(torch.isfinite(values).all())
            return [f"{info.name}: found NaN or infinity, expected finite values"] if odd else []
        blocks = self.file.raw(info.name).reshape(-1, block_layout(info.type_name)[1])
        for place in HALF_PLACES[info.type_name]:
            halves = blocks[:, place : place + 2].contiguous().view(torch.float16)
            if not bool(torch.isfinite(halves).all()):
                return [f"{info.name}: found a scale that is NaN or infinite, expected finite ones"]
        return []


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
        problems = problems or unwritable(source)
        if problems:
            return problems
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
        types = tensor_types(source, plans, dtype)
        return GGUFWriter(folder, source, types, file_type_of(plans) or DTYPE_TYPES[dtype], plans)

    def layout(self, source: Source, plans: list[LinearPlan], dtype: Any) -> ArtifactLayout:
        sizes = {name: info.size for name, info in tensor_table(source, tensor_types(source, plans, dtype)).items()}

        def names() -> list[str]:
            weighs = any(plan.method is not None and plan.method.importance is True for plan in plans)
            return _file_names(source, file_type_of(plans) or DTYPE_TYPES[dtype])[: 1 + weighs]

        return ArtifactLayout(sizes, lambda: _file_bytes(source, plans, dtype), names)

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


def _file_names(source: Source, file_type: str) -> list[str]:
    """Of the file, and of the importance matrix that a run may write beside it."""
    return [f"{model_name(source)}-{file_type}.gguf", f"{model_name(source)}.imatrix"]


def _file_bytes(source: Source, plans: list[LinearPlan], dtype: torch.dtype) -> int | None:
    """Of the whole file, which its writer makes as long as it will be before the first tensor comes; None for a model
    whose tokenizer is not at hand."""
    try:
        source.tokenizer_folder()
    except ModelError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        types = tensor_types(source, plans, dtype)
        writer = GGUFWriter(Path(folder), source, types, file_type_of(plans) or DTYPE_TYPES[dtype], plans)
        writer.close()
        return writer.path.stat().st_size


def _the_file(path: Path) -> Path | None:
    """The .gguf file that a path is, or that the folder holds alone."""
    if path.is_dir():
        found = [item for item in path.iterdir() if item.suffix == ".gguf" and item.is_file()]
        return found[0] if len(found) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None
