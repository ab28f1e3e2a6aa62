"""What a method is: a frozen section of the recipe that turns the weights of a block into quantized tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.affine import full_range
from quantkit.maths.gram import Importance, InputStatistics, Look
from quantkit.model.blocks import Block
from quantkit.model.source import Source
from quantkit.schema import Frozen
from quantkit.tensors import Grid, GroupTensor, QuantizedTensor

if TYPE_CHECKING:
    from quantkit.methods.calibrated import CalibratedBlock
    from quantkit.sections import CalibrationSection

Scales = Annotated[
    Literal["balanced", "inputs"],
    Field(
        description="what scales go by: balanced weighs inputs against what their weights do to the ranges of groups; "
        "inputs does not look at weights, which with exponents: 20 is AWQ's paper's"
    ),
]


@dataclass(frozen=True)
class BlockWeights:
    """The tensors of one block that a method may look at.

    block: the names. weights: {linear module name: weight [out, in] in the source's dtype}, the ones to quantize.
    others: {tensor name: tensor}, everything else of the block (norms, biases, linears of other methods).
    norm_offset: what a normalization adds to its gain before multiplying (Gemma: 1). importance: {linear module name:
    importance of its columns} from a file. methods: {linear module name: its own settings} where they differ inside
    what is treated together.
    """

    block: Block
    weights: Mapping[str, Tensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    norm_offset: float = 0.0
    head_dim: int | None = None
    importance: Mapping[str, Importance] = field(default_factory=dict)
    methods: Mapping[str, Method] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockResult:
    """What a method made of a block.

    quantized: {linear module name: quantized tensor}. replaced: {tensor name: new tensor, float32} for tensors that are
    stored unquantized but had a scale folded in. applied: {linear module name: what was really done, such as
    "gptq 4-bit g128 act-order"}; notes: {linear module name: why that differs from what was asked}.
    sqnr_db: {linear module name: signal to quantization noise, None where nothing is lost} of those whose codes were
    compared with the weight that they were made of, which may be another than the stored one.
    """

    quantized: Mapping[str, QuantizedTensor]
    applied: Mapping[str, str]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    sqnr_db: Mapping[str, float | None] = field(default_factory=dict)


def merge(results: Iterable[BlockResult]) -> BlockResult:
    """One result for a block whose linears went to several methods."""
    merged = BlockResult({}, {})
    for result in results:
        parts = {item.name: {**getattr(merged, item.name), **getattr(result, item.name)} for item in fields(merged)}
        merged = BlockResult(**parts)
    return merged


class Method(Frozen):
    """The base of every method's settings; a subclass adds `name: Literal[...]` and its fields."""

    head: ClassVar[bool] = True
    """Whether the output projection, whose inputs nobody looks at, can be quantized too."""

    formats: ClassVar[tuple[str, ...]] = ("autogptq", "autoawq", "compressed-tensors")
    """Names of the formats that can hold what the method makes, the default first; group-wise affine codes fit all
    three."""

    @property
    def compiled(self) -> bool:
        """Whether compiled loops are taken, whose libraries count in what a run holds."""
        return self.calibrated

    @property
    def calibrated(self) -> bool:
        """Whether `quantize_block` needs the statistics of its inputs."""
        return False

    @property
    def look(self) -> Look:
        """What a calibrated method has to see of the inputs; squares cost next to nothing."""
        return Look.WHOLE

    def placed(self, linear: str, source: Source, calibration: CalibrationSection) -> Method:
        """The settings for one linear of one model, where they depend on its place in it."""
        return self

    def of_block(self) -> Method:
        """The settings of all linears of a block that are treated together with one of these."""
        return self

    def begin(self, given: BlockWeights) -> CalibratedBlock | None:
        """A block whose inputs will be seen one after the other, each behind what was rounded before it; None for a
        method that does not look at them."""
        return None

    @abstractmethod
    def label(self) -> str:
        """A short text for tables, such as "gptq 4-bit g128"."""

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a linear of this shape cannot be quantized with these settings, or None when it can."""
        return None

    @abstractmethod
    def predicted_bits(self, out_features: int, in_features: int) -> float:
        """Bits a weight that a linear of this shape will take on disk, scales and zeros included."""

    @abstractmethod
    def quantize_block(self, given: BlockWeights, statistics: dict[str, InputStatistics]) -> BlockResult:
        """Quantize `given.weights`.

        statistics: {linear module name: statistics of its input}; linears that share an input share the object. They
        may be used up: those of linears that are done taken out. Empty when the method is not calibrated. Raises
        ModelError naming the tensor when a weight is not finite.
        """


def quantize_each(given: BlockWeights, quantize: Callable[[Tensor], QuantizedTensor], label: str) -> BlockResult:
    """The whole of `quantize_block` for a method that looks at one weight at a time."""
    quantized = {name: quantize(weight) for name, weight in given.weights.items()}
    return BlockResult(quantized, dict.fromkeys(quantized, label), notes=notes_of(quantized))


def notes_of(quantized: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """{linear module name: what is to be told of it} of what any method made."""
    return {name: note for name, tensor in quantized.items() if (note := lost_digits(tensor))}


def affine_misfit(grid: Grid, in_features: int) -> str | None:
    """Why a row of `in_features` columns cannot be cut into the groups of a grid, or None when it can."""
    if grid.group_size is not None and in_features % grid.group_size:
        return f"group_size {grid.group_size} does not divide in_features {in_features}"
    return None


def affine_bits(grid: Grid, out_features: int, in_features: int) -> float:
    """Bits a weight of codes, float16 scales and packed zeros, as AWQ and GPTQ files store them."""
    return grid.bits + (16 + grid.bits) * grid.groups(in_features) / in_features


def check_range(name: str, weight: Tensor, grid: Grid) -> None:
    """Raises ModelError naming a finite weight [out, in] whose groups span more than float16 scales reach."""
    reach = torch.finfo(torch.float16).max * (grid.levels - 1)
    if 2 * max(float(end.abs()) for end in weight.aminmax()) <= reach:
        return
    low, high = full_range(weight, grid)
    span = float((high - low).max())
    if span > reach:
        raise ModelError(
            f"{name}: a group spans {span:.3g}, but {grid.bits}-bit codes with float16 scales reach {reach:.3g}",
            hint=f"the checkpoint may be damaged; else add {name.removesuffix('.weight')} to skip",
        )


def lost_digits(tensor: QuantizedTensor) -> str | None:
    """What is to be told of scales that float16 stores with few digits, as those of tiny weights are; None where that
    moves the largest weights of most groups by less than a step."""
    if not isinstance(tensor, GroupTensor):
        return None
    median, half = float(tensor.scale.median()), torch.finfo(torch.float16).smallest_normal * 2**-11
    if median <= 0 or tensor.grid.levels * half <= median:
        return None
    return f"half of the scales are below {median:.1e}, where float16 keeps few digits"


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ModelError naming a tensor that holds NaN or infinity. Makes no copy of one that does not."""
    if not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        return  # one NaN makes both ends of the range NaN
    bad = int((~torch.isfinite(tensor)).sum())
    raise ModelError(
        f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite weights",
        hint="the checkpoint is damaged, or its values overflow the dtype it was saved in",
    )


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor as float32. Raises ModelError naming it when it holds NaN or infinity."""
    check_finite(name, tensor)
    return tensor.float()
