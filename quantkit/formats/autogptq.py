"""GPTQ files, read by vLLM, SGLang, TGI, ExLlama and, through gptqmodel, transformers.

Words run along the input features, low bits first; `checkpoint_format: gptq` (v1) stores each zero minus one, in its
field. Readers disagree on a v1 zero of 0 (gptqmodel adds one to whole words, so that the field's carry changes the next
row; others decode 16): gptq_v2 is exact everywhere. Source: AutoGPTQ 0.7.1, auto_gptq/nn_modules/qlinear; gptqmodel
7.6.0, gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit import __version__
from quantkit.errors import ModelError
from quantkit.formats.base import ArtifactSource, Format, LinearPlan, Writer
from quantkit.formats.folder import FLOATS, FolderArtifact, FolderWriter, Part, read_quantization_config
from quantkit.formats.group import float16_scale, grid_of, group_problems, require_grid, require_group_tensor
from quantkit.formats.layout import ArtifactLayout, Shapes, folder_layout
from quantkit.maths.packing import pack, unpack, words_for
from quantkit.model.source import Source
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor

QUANTIZE_CONFIG = "quantize_config.json"
V1, V2 = "gptq", "gptq_v2"


def pack_gptq(name: str, value: QuantizedTensor, checkpoint_format: str) -> dict[str, Tensor]:
    """qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32], scales float16 [groups, out], g_idx int32
    [in]."""
    tensor = require_group_tensor(name, value)
    module, bits = name.removesuffix(".weight"), tensor.grid.bits
    if tensor.zero is None:
        zeros = torch.full(tensor.scale.T.shape, 2 ** (bits - 1), dtype=torch.int64)
    else:
        zeros = tensor.zero.T.to(torch.int64)
    if checkpoint_format == V1:
        # masked to the field: -1 for a zero of 0 would borrow from its neighbours
        zeros = (zeros - 1) & (2**bits - 1)
    return {
        f"{module}.qweight": pack(tensor.codes, bits).T.contiguous(),  # [out, words] turned
        f"{module}.qzeros": pack(zeros, bits),
        f"{module}.scales": float16_scale(name, tensor.scale).T.contiguous(),
        f"{module}.g_idx": tensor.column_groups().to(torch.int32),
    }


def gptq_layout(plan: LinearPlan) -> Shapes:
    """What `pack_gptq` will give for a linear, in either checkpoint format."""
    grid = require_grid(plan)
    groups, out_features = grid.groups(plan.in_features), plan.out_features
    return {
        f"{plan.name}.qweight": (torch.int32, (words_for(plan.in_features, grid.bits), out_features)),
        f"{plan.name}.qzeros": (torch.int32, (groups, words_for(out_features, grid.bits))),
        f"{plan.name}.scales": (torch.float16, (groups, out_features)),
        f"{plan.name}.g_idx": (torch.int32, (plan.in_features,)),
    }


def unpack_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    checkpoint_format: str,
) -> GroupTensor:
    """The weight behind a GPTQ file's tensors; g_idx None means that columns lie in order."""
    out_features = scales.shape[1]
    in_features = qweight.shape[0] * 32 // bits
    codes = unpack(qweight.T.contiguous(), bits, in_features)  # [out, in]
    zero = unpack(qzeros, bits, out_features)  # [groups, out]
    if checkpoint_format == V1:
        zero = (zero + 1) & (2**bits - 1)
    zero = zero.T.contiguous()
    middle = bool((zero == 2 ** (bits - 1)).all())
    grid = Grid(bits, group_size, symmetric and middle)
    group_of = None
    if g_idx is not None:
        in_order = torch.arange(in_features) // (group_size or in_features)
        group_of = None if torch.equal(g_idx.long(), in_order) else g_idx.to(torch.int32)
    return GroupTensor(codes, scales.T.float().contiguous(), None if grid.symmetric else zero, grid, group_of)


def undo_borrows(qzeros: Tensor, bits: int) -> Tensor:
    """The words of gptq_v2 from v1 words of gptqmodel, which takes one from every field of a word in one subtraction.

    Source: gptqmodel 7.6.0, utils/model.py, convert_gptq_v2_to_v1_format_module; its 3-bit fields do not borrow.
    """
    assert 32 % bits == 0, f"{bits}-bit fields do not fill a word"
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return qzeros + ones  # int32 wraps around, as the subtraction did


class AutoGPTQ(Format):
    """Settings of the format."""

    engines: ClassVar[tuple[str, ...]] = ("gptqmodel",)
    name: Literal["autogptq"] = "autogptq"
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = Field(
        None,
        description="gptq (v1, zeros minus one) or gptq_v2 (zeros as they are); left out: v1 when symmetric, which all "
        "readers take, v2 when not, since readers disagree on a v1 zero of 0",
    )

    def misfits(self, plans: list[LinearPlan], source: Source) -> list[str]:
        problems = []
        for plan in plans:
            grid = grid_of(plan.method)
            if plan.method is None:
                continue
            if grid is None:
                problems.append(f"{plan.name}: {plan.method.name} does not make what the autogptq format holds")
                continue
            for what, count in (("in_features", plan.in_features), ("out_features", plan.out_features)):
                if count * grid.bits % 32:
                    problems.append(
                        f"{plan.name}: {what} {count} does not fill 32-bit words with {grid.bits}-bit codes"
                    )
        return problems

    def writer(self, folder: Path, source: Source, plans: list[LinearPlan], dtype: Any) -> Writer:
        version = self._version(plans)
        config = self._config(plans, version)

        def packed(name: str, value: QuantizedTensor) -> dict[str, Tensor]:
            return pack_gptq(name, value, version)

        extra = {QUANTIZE_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
        return FolderWriter(folder, source, plans, dtype, packed, gptq_layout, config, extra)

    def layout(self, source: Source, plans: list[LinearPlan], dtype: Any) -> ArtifactLayout:
        return folder_layout(source, plans, dtype, gptq_layout, [QUANTIZE_CONFIG])

    def _version(self, plans: list[LinearPlan]) -> str:
        """The layout of the zeros: what the recipe says, else the one that every reader of such a file gets right."""
        if self.checkpoint_format is not None:
            return self.checkpoint_format
        grids = [grid for plan in plans if (grid := grid_of(plan.method)) is not None]
        return V1 if all(grid.symmetric for grid in grids) else V2

    def _config(self, plans: list[LinearPlan], version: str) -> dict[str, Any]:
        """quantization_config: the settings of most linears, and the others under `dynamic`."""
        settings = [plan.method for plan in plans if plan.method is not None]
        main = max(settings, key=settings.count)
        grid = grid_of(main)
        assert grid is not None, "misfits are refused before a writer is made"
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": _stored(grid.group_size),
            # groups are static and columns stay in place, so no reader has to reorder, whatever the order of rounding
            # was
            "desc_act": False,
            "sym": grid.symmetric,
            "lm_head": any(plan.name == "lm_head" and plan.method is not None for plan in plans),
            "checkpoint_format": version,
            "damp_percent": getattr(main, "damp", 0.01),
            "static_groups": True,
            "true_sequential": False,
            "meta": {
                "quantizer": [f"quantkit:{__version__}"],
                "method": main.label(),
                "act_order": bool(getattr(main, "act_order", False)),
            },
        }
        dynamic: dict[str, dict[str, Any]] = {}
        for plan in plans:
            other = grid_of(plan.method)
            pattern = f"^{re.escape(plan.name)}$"
            if other is None and plan.name != "lm_head":
                dynamic[f"-:{pattern}"] = {}
            elif other is not None and other != grid:
                dynamic[f"+:{pattern}"] = {
                    "bits": other.bits,
                    "group_size": _stored(other.group_size),
                    "sym": other.symmetric,
                }
        if dynamic:
            config["dynamic"] = dynamic
        if any(rule.startswith("-:") for rule in dynamic):
            # transformers does not know `dynamic`: it takes every linear of a block for quantized unless this names
            # those that are. Whole names, which it compares by their end and vLLM as a part.
            config["modules_in_block_to_quantize"] = [[plan.name for plan in plans if plan.method is not None]]
        return config

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return (read_quantization_config(path) or {}).get("quant_method") == "gptq"

    @classmethod
    def open(cls, path: Path) -> ArtifactSource:
        return GPTQArtifact(path)


def _stored(group_size: int | None) -> int:
    return -1 if group_size is None else group_size


class GPTQArtifact(FolderArtifact):
    """A GPTQ folder, by whatever tool."""

    format_name = "autogptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def settings_of(self, module: str) -> dict[str, Any]:
        """bits, group_size and sym of a module, `dynamic` entries applied."""
        found = {key: self.quantization.get(key) for key in ("bits", "group_size", "sym")}
        for rule, changes in (self.quantization.get("dynamic") or {}).items():
            if rule.startswith("-:"):
                continue
            if re.match(rule.removeprefix("+:"), module):
                found.update({key: changes[key] for key in found if key in changes})
                break
        return found

    def _bits(self, module: str) -> int:
        bits = self.settings_of(module)["bits"]
        if bits not in (2, 3, 4, 8):
            raise ModelError(f"{self.path}: {module}: {bits} bits; expected 2, 3, 4 or 8")
        return int(bits)

    def unpacked_shape(self, weight_name: str) -> tuple[int, int]:
        module = weight_name.removesuffix(".weight")
        words, out_features = self.matrix(f"{module}.qweight")
        return (out_features, words * 32 // self._bits(module))

    def _group_size(self, module: str, in_features: int) -> int:
        size = self.settings_of(module)["group_size"] or -1
        return in_features if size == -1 else int(size)

    def layout(self, weight_name: str) -> dict[str, Part]:
        module = weight_name.removesuffix(".weight")
        out_features, in_features = self.unpacked_shape(weight_name)
        bits, groups = self._bits(module), -(-in_features // self._group_size(module, in_features))
        return {
            "qweight": Part(("I32",), (in_features * bits // 32, out_features)),
            "qzeros": Part(("I32",), (groups, out_features * bits // 32)),
            "scales": Part(FLOATS, (groups, out_features)),
            "g_idx": Part(("I32", "I64"), (in_features,), required=False),
        }

    def odd_values(self, weight_name: str) -> list[str]:
        module = weight_name.removesuffix(".weight")
        found = self.finite(f"{module}.scales")
        if f"{module}.g_idx" in self._stored[weight_name]:
            groups = self.entry(f"{module}.scales").shape[0]
            found += group_problems(f"{module}.g_idx", self.stored(f"{module}.g_idx"), groups)
        return found

    def unpack(self, weight_name: str, get: Callable[[str], Tensor]) -> QuantizedTensor | None:
        module = weight_name.removesuffix(".weight")
        qweight, qzeros, scales = (get(f"{module}.{part}") for part in self.parts[:3])
        # files of other tools leave g_idx out where columns lie in order
        g_idx = get(f"{module}.g_idx") if f"{module}.g_idx" in self._stored[weight_name] else None
        if g_idx is not None:
            odd = group_problems(f"{self.path}: {module}.g_idx", g_idx, scales.shape[0])
            if odd:
                raise ModelError("\n".join(odd), hint="the artifact is damaged: make it again")
        settings, bits = self.settings_of(module), self._bits(module)
        size = int(settings["group_size"] or -1)
        group_size = None if size in (-1, qweight.shape[0] * 32 // bits) else size
        version = self._version()
        if version == V1 and self._borrows() and bits != 3:
            qzeros, version = undo_borrows(qzeros, bits), V2
        return unpack_gptq(qweight, qzeros, scales, g_idx, bits, group_size, bool(settings["sym"]), version)

    def _version(self) -> str:
        """gptq or gptq_v2; newer tools call the key `format`, older ones have neither."""
        version = str(self.quantization.get("checkpoint_format") or self.quantization.get("format") or V1).lower()
        if version not in (V1, V2):
            raise ModelError(f"{self.path}: checkpoint_format {version}; expected {V1} or {V2}")
        return version

    def _borrows(self) -> bool:
        """Whether gptqmodel wrote the file."""
        made_by = (self.quantization.get("meta") or {}).get("quantizer") or []
        tools = [made_by] if isinstance(made_by, str) else made_by
        return any(str(tool).lower().startswith("gptqmodel:") for tool in tools)
