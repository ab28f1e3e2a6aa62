"""AutoAWQ's "gemm" files, read by vLLM, SGLang, TGI and, through gptqmodel, transformers.

Words run along the output features, eight nibbles each in the order 0 2 4 6 1 3 5 7; zeros are stored as they are.
Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats.base import ArtifactSource, Format, LinearPlan, Writer
from quantkit.formats.folder import FLOATS, FolderArtifact, FolderWriter, Part, read_quantization_config
from quantkit.formats.group import float16_scale, grid_of, require_grid, require_group_tensor
from quantkit.formats.layout import ArtifactLayout, Shapes, folder_layout
from quantkit.maths.packing import awq_deinterleave, pack_awq_rows, unpack
from quantkit.model.blocks import architecture_of
from quantkit.model.source import Source
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor

WORD = 8
"""4-bit codes in an int32."""


def pack_awq(name: str, value: QuantizedTensor) -> dict[str, Tensor]:
    """qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales float16 [groups, out] of a weight."""
    tensor = require_group_tensor(name, value)
    module = name.removesuffix(".weight")
    zeros = tensor.zero
    if zeros is None:
        zeros = torch.full(tensor.scale.shape, 2 ** (tensor.grid.bits - 1), dtype=torch.uint8)
    return {
        f"{module}.qweight": pack_awq_rows(tensor.codes),
        f"{module}.qzeros": pack_awq_rows(zeros),
        f"{module}.scales": float16_scale(name, tensor.scale).T.contiguous(),
    }


def awq_layout(plan: LinearPlan) -> Shapes:
    """What `pack_awq` will give for a linear."""
    grid = require_grid(plan)
    words, groups = plan.out_features // WORD, grid.groups(plan.in_features)
    return {
        f"{plan.name}.qweight": (torch.int32, (plan.in_features, words)),
        f"{plan.name}.qzeros": (torch.int32, (groups, words)),
        f"{plan.name}.scales": (torch.float16, (groups, plan.out_features)),
    }


def unpack_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int | None, zero_point: bool
) -> GroupTensor:
    """The weight behind AutoAWQ's three tensors."""
    out_features = scales.shape[1]
    codes = awq_deinterleave(unpack(qweight, 4, out_features)).T.contiguous()  # [out, in]
    zero = awq_deinterleave(unpack(qzeros, 4, out_features)).T.contiguous()  # [out, groups]
    symmetric = not zero_point and bool((zero == 8).all())
    grid = Grid(4, group_size, symmetric)
    return GroupTensor(codes, scales.T.float().contiguous(), None if symmetric else zero, grid)


class AutoAWQ(Format):
    """Settings of the format; it has none."""

    engines: ClassVar[tuple[str, ...]] = ("gptqmodel",)
    name: Literal["autoawq"] = "autoawq"

    def misfits(self, plans: list[LinearPlan], source: Source) -> list[str]:
        problems = []
        head = architecture_of(source.config).head
        sizes: dict[tuple[int | None, bool], str] = {}
        for plan in plans:
            grid = grid_of(plan.method)
            if plan.method is None:
                continue
            if grid is None:
                problems.append(f"{plan.name}: {plan.method.name} does not make what the autoawq format holds")
                continue
            sizes.setdefault((grid.group_size, grid.symmetric), plan.name)
            if grid.bits != 4:
                problems.append(f"{plan.name}: the autoawq format holds 4 bits, found {grid.bits}")
            if plan.name == head:
                problems.append(f"{plan.name}: readers of autoawq files keep it unquantized; expected it in skip")
            if plan.out_features % WORD:
                problems.append(f"{plan.name}: out_features {plan.out_features} is not divisible by {WORD}")
        if len(sizes) > 1:
            found = ", ".join(f"group_size {size} at {name}" for (size, _), name in sizes.items())
            problems.append(
                f"the autoawq format holds one group size and one kind of zero for all layers, found {found}"
            )
        return problems

    def writer(self, folder: Path, source: Source, plans: list[LinearPlan], dtype: Any) -> Writer:
        first = next(plan.method for plan in plans if plan.method is not None)
        grid = grid_of(first)
        assert grid is not None, "misfits are refused before a writer is made"
        config = {
            "quant_method": "awq",
            "bits": grid.bits,
            "group_size": -1 if grid.group_size is None else grid.group_size,
            "zero_point": not grid.symmetric,
            "version": "gemm",
            # readers match these as substrings of module names
            "modules_to_not_convert": [plan.name for plan in plans if plan.method is None] or None,
        }
        return FolderWriter(folder, source, plans, dtype, pack_awq, awq_layout, config)

    def layout(self, source: Source, plans: list[LinearPlan], dtype: Any) -> ArtifactLayout:
        return folder_layout(source, plans, dtype, awq_layout)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return (read_quantization_config(path) or {}).get("quant_method") == "awq"

    @classmethod
    def open(cls, path: Path) -> ArtifactSource:
        return AWQArtifact(path)


class AWQArtifact(FolderArtifact):
    """An AutoAWQ folder, by whatever tool."""

    format_name = "autoawq"
    parts = ("qweight", "qzeros", "scales")

    def unpacked_shape(self, weight_name: str) -> tuple[int, int]:
        in_features, words = self.matrix(f"{weight_name.removesuffix('.weight')}.qweight")
        return (words * WORD, in_features)

    def layout(self, weight_name: str) -> dict[str, Part]:
        out_features, in_features = self.unpacked_shape(weight_name)
        size = self.quantization.get("group_size", 128)
        groups = 1 if size in (-1, None) else -(-in_features // size)
        return {
            "qweight": Part(("I32",), (in_features, out_features // WORD)),
            "qzeros": Part(("I32",), (groups, out_features // WORD)),
            "scales": Part(FLOATS, (groups, out_features)),
        }

    def odd_values(self, weight_name: str) -> list[str]:
        return self.finite(f"{weight_name.removesuffix('.weight')}.scales")

    def unpack(self, weight_name: str, get: Callable[[str], Tensor]) -> QuantizedTensor | None:
        module = weight_name.removesuffix(".weight")
        qweight, qzeros, scales = (get(f"{module}.{part}") for part in self.parts)
        bits = self.quantization.get("bits", 4)
        version = self.quantization.get("version") or self.quantization.get("format") or "gemm"
        if bits != 4 or str(version).lower() != "gemm":
            raise ModelError(f"{self.path}: awq version {version} with {bits} bits; expected gemm with 4 bits")
        size = self.quantization.get("group_size", 128) or -1
        group_size = None if size in (-1, qweight.shape[0]) else size
        return unpack_awq(qweight, qzeros, scales, group_size, bool(self.quantization.get("zero_point", True)))
