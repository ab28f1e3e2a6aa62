"""compressed-tensors "pack-quantized" folders: vLLM's and llm-compressor's own, read by transformers as well.

Words run along the input features, those of the zeros along the output features, low bits first. A code is stored as a
signed integer plus 2**(bits - 1), which is the code itself. Scales are float16: a reader that holds them in bfloat16
rounds them, so an artifact is float16 or float32. Source: compressed-tensors 0.20.0, compressors/pack_quantized,
quantization/quant_args.py, utils/match.py; weight_g_idx: 0.15.0.1, quantization/lifecycle/forward_helpers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import ModelError, RecipeError
from quantkit.formats.base import ArtifactSource, Format, LinearPlan, Writer
from quantkit.formats.compressed_schemes import PACKED, read_schemes
from quantkit.formats.folder import FLOATS, FolderArtifact, FolderWriter, Part, read_quantization_config
from quantkit.formats.group import (
    float16_scale,
    grid_of,
    group_problems,
    padding_problems,
    require_grid,
    require_group_tensor,
)
from quantkit.formats.layout import ArtifactLayout, Shapes, folder_layout
from quantkit.maths.packing import pack, unpack, words_for
from quantkit.model.blocks import architecture_of
from quantkit.model.source import Source
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor

QUANT_METHOD = "compressed-tensors"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""What is stored for a linear; weight_zero_point only when the grid is asymmetric."""
COLUMN_GROUPS = "weight_g_idx"
"""The group of each column in files made before the package gave this up, in August 2026."""


def pack_weight(name: str, value: QuantizedTensor) -> dict[str, Tensor]:
    """weight_packed int32 [out, in*bits/32 rounded up], weight_scale float16 [out, groups], weight_shape int64 [2] and,
    when asymmetric, weight_zero_point int32 [out*bits/32 rounded up, groups] of a weight.

    Raises ModelError when columns lie out of order, which the package reads no more, or scales do not fit float16.
    """
    tensor = require_group_tensor(name, value)
    module, bits = name.removesuffix(".weight"), tensor.grid.bits
    if tensor.group_of is not None:
        raise ModelError(
            f"{name}: its groups are not runs of columns; expected column j in group j // group_size, "
            "since compressed-tensors reads no weight_g_idx any more"
        )
    packed = {
        f"{module}.weight_packed": pack(tensor.codes, bits),
        f"{module}.weight_scale": float16_scale(name, tensor.scale).contiguous(),
        f"{module}.weight_shape": torch.tensor(tensor.shape),
    }
    if tensor.zero is not None:
        packed[f"{module}.weight_zero_point"] = pack(tensor.zero.T, bits).T.contiguous()  # [groups, words] turned
    return packed


def packed_layout(plan: LinearPlan) -> Shapes:
    """What `pack_weight` will give for a linear."""
    grid = require_grid(plan)
    groups = grid.groups(plan.in_features)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{plan.name}.weight_packed": (torch.int32, (plan.out_features, words_for(plan.in_features, grid.bits))),
        f"{plan.name}.weight_scale": (torch.float16, (plan.out_features, groups)),
        f"{plan.name}.weight_shape": (torch.int64, (2,)),
    }
    if not grid.symmetric:
        words = words_for(plan.out_features, grid.bits)
        shapes[f"{plan.name}.weight_zero_point"] = (torch.int32, (words, groups))
    return shapes


def unpack_weight(where: str, parts: Mapping[str, Tensor], grid: Grid) -> GroupTensor:
    """The weight behind the stored tensors of a linear, by their endings.

    Raises ModelError, with `where` before it, when their shapes do not fit together.
    """
    shape = parts["weight_shape"].tolist()
    if len(shape) != 2 or min(shape) < 1:
        raise ModelError(f"{where}.weight_shape: found {shape}, expected [out_features, in_features]")
    out_features, in_features = shape
    groups = grid.groups(in_features)
    expected = {
        "weight_packed": (out_features, words_for(in_features, grid.bits)),
        "weight_scale": (out_features, groups),
        "weight_zero_point": (words_for(out_features, grid.bits), groups),
        COLUMN_GROUPS: (in_features,),
    }
    for part, size in expected.items():
        if part in parts and tuple(parts[part].shape) != size:
            raise ModelError(
                f"{where}.{part}: shape {list(parts[part].shape)}, expected {list(size)} for a {grid.label()} "
                f"weight of {shape}"
            )
    zero = None
    if not grid.symmetric:
        zero = unpack(parts["weight_zero_point"].T.contiguous(), grid.bits, out_features).T.contiguous()
    codes = unpack(parts["weight_packed"], grid.bits, in_features)
    group_of = _group_of(where, parts.get(COLUMN_GROUPS), grid, in_features)
    return GroupTensor(codes, parts["weight_scale"].float(), zero, grid, group_of)


def _group_of(where: str, g_idx: Tensor | None, grid: Grid, in_features: int) -> Tensor | None:
    """GroupTensor.group_of; -1 stands in files whose columns were never reordered."""
    if g_idx is None or bool((g_idx == -1).any()):
        return None
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= grid.groups(in_features):
        raise ModelError(f"{where}.{COLUMN_GROUPS}: a group outside 0 to {grid.groups(in_features) - 1}")
    in_order = torch.arange(in_features) // (grid.group_size or in_features)
    return None if torch.equal(g_idx.long(), in_order) else g_idx.to(torch.int32)


class CompressedTensors(Format):
    """Its pack-quantized variant: weights alone are quantized (W4A16, W8A16 and the like)."""

    engines: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    name: Literal["compressed-tensors"] = "compressed-tensors"

    def misfits(self, plans: list[LinearPlan], source: Source) -> list[str]:
        return [
            f"{plan.name}: {plan.method.name} does not make what the compressed-tensors format holds"
            for plan in plans
            if plan.method is not None and grid_of(plan.method) is None
        ]

    def writer(self, folder: Path, source: Source, plans: list[LinearPlan], dtype: Any) -> Writer:
        if dtype == torch.bfloat16:
            raise RecipeError(
                "model.dtype: bfloat16, in which readers of compressed-tensors hold the scales and round them; "
                "expected float16 or float32",
                hint="--set model.dtype=float16",
            )
        return FolderWriter(folder, source, plans, dtype, pack_weight, packed_layout, _config(plans, source))

    def layout(self, source: Source, plans: list[LinearPlan], dtype: Any) -> ArtifactLayout:
        return folder_layout(source, plans, dtype, packed_layout)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return (read_quantization_config(path) or {}).get("quant_method") == QUANT_METHOD

    @classmethod
    def open(cls, path: Path) -> ArtifactSource:
        return CompressedTensorsArtifact(path)


def _config(plans: list[LinearPlan], source: Source) -> dict[str, Any]:
    """quantization_config: a config group for each grid."""
    schemes: dict[tuple[Grid, str | None], list[str]] = {}
    head = architecture_of(source.config).head
    ignored = [] if any(plan.name == head for plan in plans) else [head]  # a tied one is a Linear to readers as well
    for plan in plans:
        grid = grid_of(plan.method)
        if grid is None:
            ignored.append(plan.name)
        else:
            schemes.setdefault((grid, _order(plan.method)), []).append(plan.name)
    groups = {}
    for index, ((grid, order), names) in enumerate(schemes.items()):
        groups[f"group_{index}"] = {
            # vLLM looks for a class before it looks for the parts of a fused layer: with several grids only names tell
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "channel" if grid.group_size is None else "group",
                "group_size": grid.group_size,
                "dynamic": False,
                "actorder": order,
            },
            "input_activations": None,
            "output_activations": None,
            "format": PACKED,
        }
    return {
        "quant_method": QUANT_METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _order(method: Any) -> str | None:
    """`actorder`: "static" when columns were rounded in the order of their inputs while groups stayed as they lie."""
    ordered = getattr(method, "act_order", False) or getattr(method, "rounding", None) == "gptq"
    return "static" if ordered else None


class CompressedTensorsArtifact(FolderArtifact):
    """A pack-quantized folder, by whatever tool."""

    format_name = "compressed-tensors"
    parts = (*PARTS, COLUMN_GROUPS)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.schemes = read_schemes(str(folder / "config.json"), self.quantization)

    def grid(self, module: str) -> Grid:
        """The grid of a linear, by the config group that targets it most closely.

        Raises ModelError when none does.
        """
        ranked = [(rank, scheme.grid) for scheme in self.schemes if (rank := scheme.rank(module)) is not None]
        if not ranked:
            raise ModelError(f"{self.path}: {module}: packed, but no config group targets it")
        return min(ranked, key=lambda pair: pair[0])[1]

    def unpacked_shape(self, weight_name: str) -> tuple[int, int]:
        shape = self.stored(f"{weight_name.removesuffix('.weight')}.weight_shape").tolist()
        if len(shape) != 2:
            raise ModelError(f"{self.path}: {weight_name}: weight_shape {shape}, expected two numbers")
        return (shape[0], shape[1])

    def layout(self, weight_name: str) -> dict[str, Part]:
        out_features, in_features = self.unpacked_shape(weight_name)
        grid = self.grid(weight_name.removesuffix(".weight"))
        groups = grid.groups(in_features)
        found = {
            "weight_packed": Part(("I32",), (out_features, words_for(in_features, grid.bits))),
            "weight_scale": Part(FLOATS, (out_features, groups)),
            "weight_shape": Part(("I64", "I32"), (2,)),
            COLUMN_GROUPS: Part(("I32", "I64"), (in_features,), required=False),
        }
        if not grid.symmetric:
            found["weight_zero_point"] = Part(("I32",), (words_for(out_features, grid.bits), groups))
        return found

    def odd_values(self, weight_name: str) -> list[str]:
        module = weight_name.removesuffix(".weight")
        out_features, in_features = self.unpacked_shape(weight_name)
        grid = self.grid(module)
        found = self.finite(f"{module}.weight_scale")
        packed = f"{module}.weight_packed"
        found += padding_problems(packed, self.stored(packed), in_features, grid.bits)
        if not grid.symmetric:
            zeros = f"{module}.weight_zero_point"
            found += padding_problems(zeros, self.stored(zeros).T, out_features, grid.bits)
        if f"{module}.{COLUMN_GROUPS}" in self._stored[weight_name]:
            g_idx = self.stored(f"{module}.{COLUMN_GROUPS}")
            if not bool((g_idx == -1).any()):
                found += group_problems(f"{module}.{COLUMN_GROUPS}", g_idx, grid.groups(in_features))
        return found

    def unpack(self, weight_name: str, get: Callable[[str], Tensor]) -> QuantizedTensor | None:
        module = weight_name.removesuffix(".weight")
        grid = self.grid(module)
        wanted = [*PARTS[:3], *([] if grid.symmetric else PARTS[3:])]
        if f"{module}.{COLUMN_GROUPS}" in self._stored[weight_name]:
            wanted.append(COLUMN_GROUPS)
        return unpack_weight(f"{self.path}: {module}", {part: get(f"{module}.{part}") for part in wanted}, grid)
