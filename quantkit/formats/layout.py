"""What an artifact in a Hugging Face folder will store, to the byte, from the plan and the headers alone.

The writer asks for the same layouts and holds every tensor against them, so that a forecast cannot drift from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from quantkit.formats.base import LinearPlan
from quantkit.formats.safetensors_stream import MAX_SHARD_BYTES, file_names, stream_bytes
from quantkit.model.blocks import is_left_out
from quantkit.model.source import Source

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of what is stored, by its full name."""

LayoutOf = Callable[[LinearPlan], Shapes]
"""What a format stores for a linear that is quantized."""


@dataclass(frozen=True)
class ArtifactLayout:
    """Every tensor of an artifact before it exists.

    tensor_bytes: {name of the source's tensor: bytes of its data}. measure_files: the bytes of the weight files with
    their headers, or None where that takes files that are not at hand; a GGUF file takes seconds. name_files: what the
    writer's files will be called, for a model whose files are at hand. files_exact: whether those are to the byte, and
    as many: they are not where the order of writing decides after which tensor a file ends.
    """

    tensor_bytes: Mapping[str, int]
    measure_files: Callable[[], int | None]
    name_files: Callable[[], list[str]]
    files_exact: bool = True

    @property
    def total_bytes(self) -> int:
        """Of all tensors, without headers."""
        return sum(self.tensor_bytes.values())


def stored_shapes(
    source: Source, plans: Sequence[LinearPlan], dtype: torch.dtype, layout_of: LayoutOf
) -> dict[str, Shapes]:
    """What is stored for each tensor of a source, in its order. dtype: of floats that stay unquantized."""
    quantized = {f"{plan.name}.weight": plan for plan in plans if plan.method is not None}
    shapes: dict[str, Shapes] = {}
    for name in source.names():
        if is_left_out(source, name):
            continue
        if name in quantized:
            shapes[name] = layout_of(quantized[name])
        else:
            found = source.dtype(name)
            shapes[name] = {name: (dtype if found.is_floating_point else found, source.shape(name))}
    return shapes


def bytes_of(shapes: Shapes) -> int:
    """Of the data of some tensors."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in shapes.values())


def folder_layout(
    source: Source,
    plans: Sequence[LinearPlan],
    dtype: torch.dtype,
    layout_of: LayoutOf,
    extra_files: Sequence[str] = (),
) -> ArtifactLayout:
    """The layout of a folder's weight files. extra_files: names of those that the format's reader wants besides."""
    stored = stored_shapes(source, plans, dtype, layout_of)
    sizes = {name: bytes_of(shapes) for name, shapes in stored.items()}
    groups = [{part: bytes_of({part: what}) for part, what in shapes.items()} for shapes in stored.values()]
    files = stream_bytes(groups, MAX_SHARD_BYTES)

    def names() -> list[str]:
        return [*file_names(len(files)), *extra_files, "config.json", *(path.name for path in source.side_files())]

    return ArtifactLayout(sizes, lambda: sum(files), names, files_exact=len(files) == 1)
