"""bitsandbytes: LLM.int8 and 4-bit weights in the names that transformers and vLLM load.

Written from what the quantizer gave, never from a module: on some processors bitsandbytes lays 4-bit weights out anew
in place when a module runs. Source: bitsandbytes, nn/modules.py (state dicts of Linear8bitLt and Linear4bit) and
functional.py (QuantState); transformers, quantizers/quantizer_bnb_*.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.formats.base import ArtifactSource, Format, LinearPlan, Writer
from quantkit.formats.folder import FolderArtifact, FolderWriter, Part, read_quantization_config
from quantkit.formats.layout import ArtifactLayout, LayoutOf, Shapes, folder_layout
from quantkit.maths.blockwise import NF4_VALUES, nf4_codebook
from quantkit.methods.nf4 import NESTED_BLOCK_SIZE
from quantkit.model.blocks import architecture_of
from quantkit.model.source import Source
from quantkit.tensors import CodebookBlocks, Int8Rows, QuantizedTensor, StoredTensors

ROW_LAYOUT = 0
"""weight_format of the plain order of rows, the only one since the library dropped those of old GPUs."""

MAX_STATE_BYTES = 10_000  # of the JSON text beside a 4-bit weight, which has 200

INT8_PARTS = ("SCB", "weight", "weight_format")
TABLES = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")

_OFFSET_DIGITS = 22
"""Of a float32 as Python writes it, at most: 17 digits of mantissa behind 0.000 or before e-45."""


def state_part(quant_type: str) -> str:
    """Ending of the JSON text beside a 4-bit weight."""
    return f"weight.quant_state.bitsandbytes__{quant_type}"


def four_bit_parts(quant_type: str) -> tuple[str, ...]:
    """Endings behind a module's name that a 4-bit linear is stored under; the first one marks it."""
    return (state_part(quant_type), *TABLES)


def pack_int8(weight_name: str, value: Int8Rows) -> StoredTensors:
    """weight int8 [out, in], SCB float32 [out], weight_format uint8 []."""
    module = weight_name.removesuffix(".weight")
    return {
        weight_name: value.codes,
        f"{module}.SCB": value.absmax,
        f"{module}.weight_format": torch.tensor(ROW_LAYOUT, dtype=torch.uint8),
    }


def pack_nf4(weight_name: str, value: CodebookBlocks, dtype: torch.dtype) -> StoredTensors:
    """Codes, tables, and the rest as JSON. dtype: what the reader decodes to.

    Raises ModelError when the weights do not fit that dtype.
    """
    largest = float(value.block_scale().abs().max())
    if largest > torch.finfo(dtype).max:
        raise ModelError(
            f"{weight_name}: values up to {largest:.3g} do not fit {_name(dtype)}, whose largest is "
            f"{torch.finfo(dtype).max:.5g}",
            hint="--set model.dtype=bfloat16",
        )
    nested = None
    stored = {
        weight_name: value.packed,
        f"{weight_name}.absmax": value.absmax,
        f"{weight_name}.quant_map": value.codebook,
    }
    if value.nested_absmax is not None:
        assert value.nested_codebook is not None
        assert value.nested_block_size is not None and value.nested_offset is not None
        nested = (value.nested_block_size, value.nested_offset)
        stored[f"{weight_name}.nested_absmax"] = value.nested_absmax
        stored[f"{weight_name}.nested_quant_map"] = value.nested_codebook
    text = state_text(value.block_size, dtype, value.shape, nested)
    module = weight_name.removesuffix(".weight")
    stored[f"{module}.{state_part('nf4')}"] = torch.tensor(list(text), dtype=torch.uint8)
    return stored


def state_text(block_size: int, dtype: torch.dtype, shape: tuple[int, int], nested: tuple[int, float] | None) -> bytes:
    """The JSON beside an NF4 weight. nested: block size and offset of double-quantized scales."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block_size,
        "dtype": _name(dtype),
        "shape": list(shape),
    }
    if nested is None:
        return json.dumps(state).encode()
    size, offset = nested
    state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    # blanks after it, which JSON allows, so that the tensor's size is known before the offset is
    return (json.dumps(state) + " " * (_OFFSET_DIGITS - len(json.dumps(offset)))).encode()


def int8_layout(plan: LinearPlan) -> Shapes:
    """What `pack_int8` will give for a linear."""
    return {
        f"{plan.name}.weight": (torch.int8, (plan.out_features, plan.in_features)),
        f"{plan.name}.SCB": (torch.float32, (plan.out_features,)),
        f"{plan.name}.weight_format": (torch.uint8, ()),
    }


def nf4_layout(plan: LinearPlan, dtype: torch.dtype) -> Shapes:
    """What `pack_nf4` will give for a linear. dtype: what the reader decodes to."""
    assert plan.method is not None
    count = plan.out_features * plan.in_features
    blocks = -(-count // plan.method.block_size)
    double = plan.method.double_quant
    name = f"{plan.name}.weight"
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.uint8, (-(-count // 2), 1)),
        f"{name}.absmax": (torch.uint8 if double else torch.float32, (blocks,)),
        f"{name}.quant_map": (torch.float32, (len(NF4_VALUES),)),
    }
    nested = None
    if double:
        nested = (NESTED_BLOCK_SIZE, 0.0)
        shapes[f"{name}.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),))
        shapes[f"{name}.nested_quant_map"] = (torch.float32, (256,))
    text = state_text(plan.method.block_size, dtype, (plan.out_features, plan.in_features), nested)
    shapes[f"{plan.name}.{state_part('nf4')}"] = (torch.uint8, (len(text),))
    return shapes


def layout_of(dtype: torch.dtype) -> LayoutOf:
    """What is stored for a linear of either method."""

    def layout(plan: LinearPlan) -> Shapes:
        assert plan.method is not None
        return nf4_layout(plan, dtype) if plan.method.name == "nf4" else int8_layout(plan)

    return layout


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class BitsAndBytesArtifact(FolderArtifact):
    """A folder of LLM.int8, NF4 or FP4 weights, made here or by transformers."""

    format_name = "bitsandbytes"

    def __init__(self, folder: Path):
        config = read_quantization_config(folder) or {}
        quant_type = str(config.get("bnb_4bit_quant_type", "fp4"))  # the library's own default
        self._is_int8 = not config.get("load_in_4bit")
        self.parts = INT8_PARTS if self._is_int8 else four_bit_parts(quant_type)
        self._states: dict[str, dict[str, Any]] = {}
        super().__init__(folder)

    def unpacked_shape(self, weight_name: str) -> tuple[int, int]:
        if not self._is_int8:
            out_features, in_features = self._state(weight_name)["shape"]
            return (out_features, in_features)
        shape = self.entry(weight_name).shape
        if len(shape) != 2:
            raise self._damaged(weight_name, f"shape {list(shape)}, expected [out, in]")
        return (shape[0], shape[1])

    def unpack(self, weight_name: str, get: Callable[[str], Tensor]) -> QuantizedTensor | None:
        return self._int8(weight_name, get) if self._is_int8 else self._four_bit(weight_name, get)

    def layout(self, weight_name: str) -> dict[str, Part]:
        out_features, in_features = self.unpacked_shape(weight_name)
        if self._is_int8:
            return {
                "weight": Part(("I8",), (out_features, in_features)),
                "SCB": Part(("F32",), (out_features,)),
                "weight_format": Part(("U8",), (), required=False),
            }
        state = self._state(weight_name)
        count = out_features * in_features
        blocks, nested = -(-count // state["blocksize"]), "nested_blocksize" in state
        packed = self.entry(weight_name)
        wide = packed.dtype != "U8" and packed.end - packed.start == -(-count // 2)  # words of another width
        found = {
            self.parts[0]: Part(("U8",), self.entry(f"{weight_name.removesuffix('.weight')}.{self.parts[0]}").shape),
            "weight": Part((packed.dtype,), packed.shape) if wide else Part(("U8",), (-(-count // 2), 1)),
            "weight.absmax": Part(("U8" if nested else "F32",), (blocks,)),
            "weight.quant_map": Part(("F32",), (16,)),
        }
        if nested:
            found["weight.nested_absmax"] = Part(("F32",), (-(-blocks // state["nested_blocksize"]),))
            found["weight.nested_quant_map"] = Part(("F32",), (256,))
        return found

    def odd_values(self, weight_name: str) -> list[str]:
        module = weight_name.removesuffix(".weight")
        if self._is_int8:
            found = self.finite(f"{module}.SCB", least=0.0)
            if bool((self.stored(weight_name) == -128).any()):
                found.append(f"{weight_name}: found -128, expected codes from -127 to 127")
            layout = f"{module}.weight_format"
            if layout in self._files and int(self.stored(layout)) != ROW_LAYOUT:
                found.append(f"{layout}: found {int(self.stored(layout))}, expected {ROW_LAYOUT} (rows)")
            return found
        state = self._state(weight_name)
        nested = "nested_blocksize" in state
        found = self.finite(f"{weight_name}.{'nested_absmax' if nested else 'absmax'}", least=0.0)
        if nested:
            found += self.finite(f"{weight_name}.nested_quant_map")
            if not math.isfinite(state["nested_offset"]):
                found.append(f"{module}.{self.parts[0]}: nested_offset {state['nested_offset']}, expected a number")
        table = self.stored(f"{weight_name}.quant_map")
        if state.get("quant_type") == "nf4" and not torch.equal(table, nf4_codebook(torch.device("cpu"))):
            found.append(f"{weight_name}.quant_map: found {table.tolist()[:3]}..., expected the table of NF4")
        return found

    def _int8(self, weight_name: str, get: Callable[[str], Tensor]) -> Int8Rows:
        module = weight_name.removesuffix(".weight")
        codes, absmax = get(weight_name), get(f"{module}.SCB")
        layout = f"{module}.weight_format"
        if layout in self._files and int(get(layout)) != ROW_LAYOUT:
            raise ModelError(f"{self.path}: {layout}: layout {int(get(layout))}, expected {ROW_LAYOUT} (rows)")
        return Int8Rows(codes, absmax)

    def _four_bit(self, weight_name: str, get: Callable[[str], Tensor]) -> CodebookBlocks:
        state = self._state(weight_name)
        shape = self.unpacked_shape(weight_name)
        packed = get(weight_name).view(torch.uint8).reshape(-1, 1)  # words of any width hold the same bytes
        absmax, codebook = get(f"{weight_name}.absmax"), get(f"{weight_name}.quant_map")
        nested = "nested_blocksize" in state
        parts: dict[str, Any] = {}
        if nested:
            outer, table = f"{weight_name}.nested_absmax", f"{weight_name}.nested_quant_map"
            size = state["nested_blocksize"]
            parts = {
                "nested_absmax": get(outer),
                "nested_codebook": get(table),
                "nested_block_size": size,
                "nested_offset": float(state["nested_offset"]),
            }
        dtype = getattr(torch, state["dtype"])
        return CodebookBlocks(packed, absmax, codebook, state["blocksize"], *shape, dtype, **parts)

    def _state(self, weight_name: str) -> dict[str, Any]:
        """The JSON text beside a 4-bit weight, its keys checked."""
        if weight_name not in self._states:
            name = f"{weight_name.removesuffix('.weight')}.{self.parts[0]}"
            place = self.entry(name)
            if place.end - place.start > MAX_STATE_BYTES:
                raise self._damaged(name, f"{place.end - place.start} bytes, expected {MAX_STATE_BYTES} or fewer")
            try:
                state = json.loads(bytes(self.stored(name).tolist()))
                whole = [state["blocksize"], state.get("nested_blocksize", 1), *state["shape"]]
                usable = all(type(size) is int and size > 0 for size in whole) and len(state["shape"]) == 2
                usable = usable and state["dtype"] in ("float16", "bfloat16", "float32")
                usable = usable and ("nested_blocksize" not in state or type(state["nested_offset"]) is float)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._damaged(name, f"not the JSON of a quantized weight: {error!r}") from error
            if not usable:
                raise self._damaged(name, f"{str(state)[:200]}, expected blocksize, dtype and shape [out, in]")
            self._states[weight_name] = state
        return self._states[weight_name]

    def _damaged(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self.path}: {name}: {what}", hint="the artifact is damaged: make it again")


class BitsAndBytes(Format):
    """A Hugging Face folder with the weights of INT8 or NF4."""

    engines: ClassVar[tuple[str, ...]] = ("transformers",)

    name: Literal["bitsandbytes"] = "bitsandbytes"

    def misfits(self, plans: list[LinearPlan], source: Source) -> list[str]:
        quantized = [plan for plan in plans if plan.method is not None]
        problems = [
            f"{plan.name}: method {plan.method.name} cannot be stored for bitsandbytes; expected int8 or nf4"
            for plan in quantized
            if plan.method is not None and plan.method.name not in ("int8", "nf4")
        ]
        if problems or not quantized:
            return problems
        first = quantized[0]
        return [
            f"{plan.name}: {_settings(plan)}, but {first.name} has {_settings(first)}; config.json holds one for all"
            for plan in quantized
            if plan.method != first.method
        ]

    def writer(self, folder: Path, source: Source, plans: list[LinearPlan], dtype: Any) -> Writer:
        method = next(plan.method for plan in plans if plan.method is not None)

        def pack(weight_name: str, value: QuantizedTensor) -> StoredTensors:
            if isinstance(value, CodebookBlocks):
                return pack_nf4(weight_name, value, dtype)
            assert isinstance(value, Int8Rows), f"{weight_name}: a {type(value).__name__} does not belong here"
            return pack_int8(weight_name, value)

        config = quantization_config(method, plans, source)
        return FolderWriter(folder, source, plans, dtype, pack, layout_of(dtype), config)

    def layout(self, source: Source, plans: list[LinearPlan], dtype: Any) -> ArtifactLayout:
        return folder_layout(source, plans, dtype, layout_of(dtype))

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        config = read_quantization_config(path)
        return config is not None and config.get("quant_method") == "bitsandbytes"

    @classmethod
    def open(cls, path: Path) -> ArtifactSource:
        return BitsAndBytesArtifact(path)


def _settings(plan: LinearPlan) -> str:
    assert plan.method is not None
    return " ".join(f"{key}={value}" for key, value in plan.method.model_dump().items())


def quantization_config(method: Any, plans: Sequence[LinearPlan], source: Source) -> dict[str, Any]:
    """The entry of config.json; linears that it does not name are taken for quantized by the readers."""
    head = architecture_of(source.config).head
    skipped = [plan.name for plan in plans if plan.method is None]
    if head not in [plan.name for plan in plans]:
        skipped.append(head)  # tied to the embedding
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": method.name == "int8",
        "load_in_4bit": method.name == "nf4",
        "llm_int8_threshold": method.threshold if method.name == "int8" else 6.0,  # no meaning for 4-bit
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
    if method.name == "nf4":
        config |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": method.compute_dtype,
            "bnb_4bit_use_double_quant": method.double_quant,
            "bnb_4bit_quant_storage": "uint8",
        }
    return config
