"""What the formats that are a Hugging Face folder share: config, side files, safetensors; each adds only its words."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats.base import ArtifactSource, LinearPlan, PackFunction, Writer
from quantkit.formats.layout import LayoutOf, stored_shapes
from quantkit.formats.safetensors_stream import MAX_SHARD_BYTES, SafetensorsStream, explained
from quantkit.manifest import fsync_folder, write_atomic
from quantkit.model.blocks import is_left_out
from quantkit.model.config_check import check_config, check_quantization
from quantkit.model.reader import TOKENIZER_FILES, is_side_file, open_shards, read_json_object, weight_files
from quantkit.model.safetensors_file import ALL_DTYPES, Entry
from quantkit.model.source import Source
from quantkit.tensors import QuantizedTensor, on_cpu

CONFIG = "config.json"
GROUPED_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""What most formats store for a linear, by the ending behind the module's name."""


class FolderWriter(Writer):
    """Writes an artifact's folder as its tensors come.

    pack: (weight name, quantized tensor) to {full tensor name: tensor}. dtype: of floating-point tensors that stay
    unquantized; others are stored as they are. quantization_config: the entry of config.json. extra_files: {file name:
    content} that the format's reader wants besides. layout_of: what `pack` will give for a linear; the header has room
    for that, and anything else is a bug. Raises DataError when the disk is full or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        plans: Sequence[LinearPlan],
        dtype: torch.dtype,
        pack: PackFunction,
        layout_of: LayoutOf,
        quantization_config: Mapping[str, Any],
        extra_files: Mapping[str, bytes] | None = None,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self.folder = folder
        self.source = source
        self.dtype = dtype
        self.pack = pack
        self._quantization_config = quantization_config
        self._extra_files = extra_files or {}
        self._shapes = stored_shapes(source, plans, dtype, layout_of)
        self._missing = set(self._shapes)
        self._quantized = {f"{plan.name}.weight" for plan in plans if plan.method is not None}
        self._added: list[str] = []  # since the last checkpoint
        names = [name for shapes in self._shapes.values() for name in shapes]
        self._stream = SafetensorsStream(folder, names, max_shard_bytes)

    def takes_parts(self, name: str) -> bool:
        return name not in self._quantized

    def add(self, name: str, value: Tensor | QuantizedTensor, first_row: int = 0) -> int:
        if is_left_out(self.source, name):
            return 0
        planned = self._shapes[name]
        if first_row == 0:
            self._missing.discard(name)
            self._added.append(name)
        if isinstance(value, Tensor):
            rows = value.to(self.dtype) if value.is_floating_point() else value
            dtype, shape = planned[name]
            assert (rows.dtype, tuple(rows.shape[1:])) == (dtype, shape[1:]), f"{name}: planned as {planned}"
            return self._stream.add_rows(name, rows, shape, first_row)
        stored = self.pack(name, on_cpu(value))
        found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored.items()}
        assert found == planned, f"{name}: planned as {planned}, got {found}"
        return self._stream.add(stored)

    def checkpoint(self) -> dict[str, Any]:
        added, self._added = self._added, []
        return {"added": added, **self._stream.checkpoint()}

    def restore(self, checkpoints: Sequence[Mapping[str, Any]]) -> None:
        for checkpoint in checkpoints:
            self._missing.difference_update(checkpoint["added"])
        self._stream.restore(checkpoints)

    def finish(self) -> list[Path]:
        assert not self._missing, f"never written: {', '.join(sorted(self._missing))}"
        paths = self._stream.finish()
        for path in self.source.side_files():
            paths.append(self._write(path.name, path.read_bytes()))
        for name, content in self._extra_files.items():
            paths.append(self._write(name, content))
        paths.append(self._write(CONFIG, self._config()))
        fsync_folder(self.folder)
        return paths

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        assert not path.exists(), f"{name} was written before"
        with explained(self.folder, len(content)):
            write_atomic(path, content)
        return path

    def _config(self) -> bytes:
        """config.json: the source's, what is quantized how, and the dtype under its new and its old name."""
        dtype = str(self.dtype).removeprefix("torch.")
        config = {**self.source.config, "dtype": dtype, "torch_dtype": dtype}
        if self.source.tied_head:
            config["tie_word_embeddings"] = True
        config["quantization_config"] = dict(self._quantization_config)
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def read_quantization_config(path: Path) -> dict[str, Any] | None:
    """The quantization_config in a folder, None when there is none. Raises ModelError for a damaged config.json."""
    file = path / CONFIG
    found = read_json_object(file).get("quantization_config") if file.is_file() else None
    return found if isinstance(found, dict) else None


FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Part:
    """A tensor that is stored for a linear. dtypes: safetensors' names of those that it may have."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    required: bool = True


class FolderArtifact(ArtifactSource):
    """An artifact in a Hugging Face folder, read back; headers are read and checked at once, tensors when asked for.

    A format's subclass says in `parts` under which endings behind a module's name a quantized linear is stored (the
    first one marks it), and what they mean in `unpack`. `read` gives float32 for quantized weights, others as stored.
    Raises ModelError when a file is missing or damaged.
    """

    parts: Sequence[str] = GROUPED_PARTS

    def __init__(self, folder: Path):
        self.path = folder
        config = read_json_object(folder / CONFIG)
        quantization = config.pop("quantization_config", None)
        if not isinstance(quantization, dict):
            raise ModelError(
                f"{folder / CONFIG}: no quantization_config, expected one in a {self.format_name} artifact"
            )
        check_config(str(folder / CONFIG), config)
        check_quantization(str(folder / CONFIG), quantization)
        self.config = config
        self.quantization: Mapping[str, Any] = quantization
        self._files = open_shards(folder, ALL_DTYPES)
        self._stored = self._stored_names()
        self._lineage: dict[str, Any] | None = None

    def _stored_names(self) -> dict[str, tuple[str, ...]]:
        """Weight name to the stored tensors that stand for it, in the order of the file."""
        quantized, module_of = {}, {}
        mark = f".{self.parts[0]}"
        for stored in self._files:
            if stored.endswith(mark):
                module = stored.removesuffix(mark)
                names = tuple(name for part in self.parts if (name := f"{module}.{part}") in self._files)
                quantized[f"{module}.weight"] = names
                module_of.update(dict.fromkeys(names, f"{module}.weight"))
        shown = dict.fromkeys(module_of.get(stored, stored) for stored in self._files)
        return {name: quantized.get(name, (name,)) for name in shown}

    @abstractmethod
    def unpack(self, weight_name: str, get: Callable[[str], Tensor]) -> QuantizedTensor | None:
        """The quantized tensor of a weight that `parts` marks. get: a stored tensor by its full name.

        Raises ModelError when what is stored does not fit together.
        """

    def unpacked_shape(self, weight_name: str) -> tuple[int, int]:
        """[out, in] of a quantized weight; a subclass that can tell it from `entry` alone saves reading the weight."""
        return self._unpacked(weight_name).shape

    def layout(self, weight_name: str) -> dict[str, Part]:
        """What has to be stored for a quantized weight, by the ending behind the module's name; empty without rules.

        Raises ModelError when its settings or its shape cannot be told.
        """
        return {}

    def odd_values(self, weight_name: str) -> list[str]:
        """Values of a quantized weight that no quantizer gives, one line each; its parts fit `layout`."""
        return []

    def problems(self, name: str) -> list[str]:
        if not self.is_quantized(name):
            value = self.stored(name)
            odd = value.is_floating_point() and not bool(torch.isfinite(value).all())
            return [f"{name}: found NaN or infinity, expected finite values"] if odd else []
        return self.misfits(name) or self.odd_values(name)

    def misfits(self, name: str) -> list[str]:
        """What of a quantized weight is not stored as `layout` says, one line each."""
        module = name.removesuffix(".weight")
        layout = self.layout(name)
        found = []
        for ending, part in layout.items():
            stored = f"{module}.{ending}"
            if stored not in self._files:
                if part.required:
                    found.append(f"{stored}: missing, expected {part.dtypes[0]} {list(part.shape)}")
                continue
            entry = self.entry(stored)
            if entry.dtype not in part.dtypes or entry.shape != part.shape:
                expected = f"{' or '.join(part.dtypes)} {list(part.shape)}"
                found.append(f"{stored}: found {entry.dtype} {list(entry.shape)}, expected {expected}")
        known = {f"{module}.{ending}" for ending in layout}
        if layout:
            found += [f"{stored}: stray tensor" for stored in self._names_of(name) if stored not in known]
        return found

    def finite(self, *stored_names: str, least: float | None = None) -> list[str]:
        """A line for each of these tensors that holds NaN, infinity or a value below `least`."""
        found = []
        for stored in stored_names:
            values = self.stored(stored).float()
            bad = ~torch.isfinite(values) if least is None else ~(torch.isfinite(values) & (values >= least))
            if bool(bad.any()):
                wanted = "finite values" if least is None else f"finite values from {least:g}"
                found.append(f"{stored}: found {float(values[bad][0]):g}, expected {wanted}")
        return found

    def entry(self, stored_name: str) -> Entry:
        """Dtype, shape and place of a stored tensor. Raises ModelError when there is none of this name."""
        if stored_name not in self._files:
            raise ModelError(
                f"{self.path}: holds no tensor {stored_name}", hint="the artifact is incomplete: make it again"
            )
        return self._files[stored_name].entries[stored_name]

    def matrix(self, stored_name: str) -> tuple[int, int]:
        """The shape of a stored matrix. Raises ModelError when it is none."""
        shape = self.entry(stored_name).shape
        if len(shape) != 2:
            raise ModelError(f"{self.path}: {stored_name}: shape {list(shape)}, expected a matrix")
        return (shape[0], shape[1])

    def stored(self, stored_name: str) -> Tensor:
        """A tensor as the file holds it. Raises ModelError when there is none of this name."""
        self.entry(stored_name)
        return self._files[stored_name].read(stored_name)

    def stored_parts(self, name: str) -> dict[str, Tensor]:
        """Every tensor that stands for a weight, as the file holds it."""
        return {stored: self.stored(stored) for stored in self._names_of(name)}

    def _names_of(self, name: str) -> tuple[str, ...]:
        if name not in self._stored:
            raise ModelError(f"{self.path}: holds no tensor {name}")
        return self._stored[name]

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is stored as codes."""
        return self._names_of(name) != (name,)

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.unpacked_shape(name) if self.is_quantized(name) else self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.is_quantized(name) else ALL_DTYPES[self.entry(name).dtype]

    def read(self, name: str) -> Tensor:
        return self._unpacked(name).dequantize() if self.is_quantized(name) else self.stored(name)

    def quantized(self, name: str) -> QuantizedTensor | None:
        return self._unpacked(name) if self.is_quantized(name) else None

    def _unpacked(self, name: str) -> QuantizedTensor:
        misfits = self.misfits(name)
        if misfits:
            lines = [f"{self.path}: {line}" for line in misfits]
            raise ModelError("\n".join(lines), hint="the artifact is damaged: make it again")
        found = self.unpack(name, self.stored)
        assert found is not None, f"{name} is marked as quantized"
        return found

    def stored_bytes(self, name: str) -> int:
        return sum(self.entry(stored).end - self.entry(stored).start for stored in self._names_of(name))

    def tokenizer_folder(self) -> Path:
        if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            raise ModelError(f"{self.path}: holds no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
        return self.path

    def side_files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if path.is_file() and is_side_file(path.name))

    def lineage(self) -> dict[str, Any]:
        if self._lineage is None:
            files = weight_files(self.path, self._files)
            self._lineage = {"kind": self.kind, "id": self.path.resolve().name, "revision": None, "files": files}
        return self._lineage
