"""ggml's block types: one type or one of llama.cpp's mixes, weighed by the importance of the columns where it is known.

Source: llama.cpp, ggml/src/ggml-quants.c and src/llama-quant.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml import FLOAT_TYPES, SEARCHED, WEIGHTED, block_layout, encode, type_size
from quantkit.maths.gram import Importance, InputStatistics, Look
from quantkit.methods.base import BlockResult, BlockWeights, Method, Scales, check_finite
from quantkit.methods.ggml_mixes import MIXES, Facts, fitted, misfit_reason, type_of
from quantkit.model.blocks import linear_shape
from quantkit.model.gguf_config import family_of_config
from quantkit.model.gguf_names import to_gguf
from quantkit.model.source import Source
from quantkit.tensors import BlockTensor

if TYPE_CHECKING:
    from quantkit.methods.calibrated import CalibratedBlock
    from quantkit.sections import CalibrationSection

PlainType = Literal["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
MixName = Literal[
    "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"
]

PLAIN_EMBEDDING = "Q8_0"
"""The embedding's type beside a plain type, unless the recipe names one."""


class GGML(Method):
    """Every linear in one ggml type or in those of a mix; the embedding, which may also be the head, in another."""

    name: Literal["ggml"] = "ggml"
    type: PlainType | MixName = Field("q8_0", description="a plain type, or a mix by llama.cpp's name and rules")
    embedding_type: PlainType | None = Field(
        None, description="of the embedding; null is what the mix says, or q8_0 with a plain type"
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="gptq calibrates: scales weighed by importance, codes chosen with error compensation"
    )
    importance: bool | str = Field(
        False,
        validate_default=True,
        description="weigh columns by the mean square of their inputs: true calibrates, a file is llama.cpp's imatrix",
    )
    exponents: int = Field(
        0,
        ge=0,
        le=200,
        description="steps of the search for scales, folded in before rounding gptq; 0 leaves scales out",
    )
    scales: Scales = "balanced"
    damp: float = Field(0.01, gt=0, lt=1, description="share of the mean diagonal added to the Gram; rounding gptq")
    refine: int = Field(
        2, ge=0, le=20, description="sweeps of coordinate descent over codes, scales and minima after GPTQ's rounding"
    )
    correction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much of what went wrong before a linear its weights make up for (GPTAQ): a share of what "
        "halves of the calibration text agree on, such as 0.75; rounding gptq; the unquantized model runs along",
    )

    @field_validator("correction")
    @classmethod
    def _needs_calibration(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("rounding") != "gptq":
            raise ValueError(f"found {value:g}, expected 0: only rounding gptq sees what went wrong before")
        return value

    @field_validator("importance")
    @classmethod
    def _names_a_file(cls, value: bool | str) -> bool | str:
        if value == "":
            raise ValueError('found "", expected true, false or the path of an imatrix file')
        return value

    @field_validator("importance")
    @classmethod
    def _suits_type_and_rounding(cls, value: bool | str, info: ValidationInfo) -> bool | str:
        compensated = info.data.get("rounding") == "gptq"
        if info.data.get("type") == "q2_k_s" and not value and not compensated:
            raise ValueError(
                "found false, expected true or a file: q2_k_s without importance is of no use; or take q2_k"
            )
        if value and compensated:
            raise ValueError(f"found {value}, expected false: rounding gptq weighs by its own calibration")
        return value

    @field_validator("rounding")
    @classmethod
    def _float_types_are_not_rounded(cls, value: str, info: ValidationInfo) -> str:
        if value == "gptq" and info.data.get("type") in ("f16", "bf16"):
            raise ValueError(f"found gptq, expected nearest: type {info.data['type']} is not quantized")
        return value

    @property
    def compiled(self) -> bool:
        return self.file_type not in FLOAT_TYPES

    @property
    def calibrated(self) -> bool:
        return self.importance is True or self.compensates

    @property
    def look(self) -> Look:
        """An importance is the diagonal alone."""
        return Look.WHOLE if self.compensates else Look.SQUARES

    @property
    def compensates(self) -> bool:
        """Whether codes are chosen with error compensation."""
        return self.rounding == "gptq"

    @property
    def propagate(self) -> Literal["unquantized", "quantized"]:
        """Whose outputs the next linears are calibrated on; an importance matrix is one of the unquantized model."""
        return "quantized" if self.compensates else "unquantized"

    @property
    def file_type(self) -> str:
        """What llama.cpp calls a file of this type, such as "Q4_K_M"."""
        return self.type.upper()

    @property
    def wanted(self) -> str:
        """ggml's name of the type that a linear should get, such as "Q4_K"; of a mix, the most usual one."""
        return MIXES.get(self.type, self.file_type)

    def type_for(self, in_features: int) -> str:
        """The type that a linear of this width gets: the wanted one, or in a mix what stands in for it."""
        return fitted(self.wanted, in_features) if self.type in MIXES else self.wanted

    def label(self) -> str:
        how = " gptq" if self.compensates else " imatrix" if self.importance else ""
        return f"gguf {self.file_type}{how}"

    def placed(self, linear: str, source: Source, calibration: CalibrationSection) -> Method:
        name = to_gguf(f"{linear}.weight", family_of_config(source.config)) or ""
        wanted = type_of(self.type, name, linear_shape(source, linear)[1], self.facts(source))
        chunks = calibration.sequences if self.calibrated else 0
        return PlacedGGML(**self.model_dump(), wanted_type=wanted, dataset=calibration.set, chunks=chunks)

    def facts(self, source: Source) -> Facts:
        """What the rules of the mixes ask of a model."""
        config: Mapping[str, Any] = source.config
        layers = int(config.get("num_hidden_layers", config.get("n_layer", 0)))
        heads = int(config.get("num_attention_heads", config.get("n_head", 1)))
        groups = int(config.get("num_key_value_heads") or heads)
        large = config.get("model_type") in ("llama", "mistral") and layers == 80 and heads != groups
        return Facts(layers, heads // groups, source.tied_head, large, bool(self.importance) or self.compensates)

    def embedding_types(self, source: Source, name: str) -> tuple[str, str]:
        """The types that the embedding, a tensor of the source, should get and gets."""
        columns = source.shape(name)[1]
        if self.embedding_type is not None or self.type not in MIXES:
            wanted = (self.embedding_type or PLAIN_EMBEDDING).upper()
            return wanted, wanted
        wanted = type_of(self.type, "token_embd.weight", columns, self.facts(source))
        return wanted, fitted(wanted, columns)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        block, _ = block_layout(self.type_for(in_features))
        if in_features % block:
            return f"type {self.type}: its block of {block} does not divide in_features {in_features}"
        return None

    def predicted_bits(self, out_features: int, in_features: int) -> float:
        return type_size(self.type_for(in_features), in_features) * 8 / in_features

    def quantize_block(self, given: BlockWeights, statistics: dict[str, InputStatistics]) -> BlockResult:
        work = self.begin(given) if statistics else None
        if work is not None:
            return work.quantize(statistics)
        quantized, applied, notes = {}, {}, {}
        for name, weight in given.weights.items():
            own = given.methods.get(name, self)
            assert isinstance(own, GGML)
            type_name = own.type_for(weight.shape[1])
            weighing = self._weighing(name, given, statistics)
            quantized[name] = self._encode(name, weight, type_name, weighing)
            weighed = weighing is not None and type_name in (*SEARCHED, *WEIGHTED)
            applied[name] = f"gguf {type_name}{' imatrix' if weighed else ''}"
            reasons = []
            if type_name != own.wanted:
                reasons.append(misfit_reason(own.wanted, weight.shape[1]))
            if isinstance(self.importance, str) and weighing is None and given.block.index >= 0:
                reasons.append(f"{self.importance} does not say how important its columns are")
            if reasons:
                notes[name] = "; ".join(reasons)
        return BlockResult(quantized, applied, notes=notes)

    def begin(self, given: BlockWeights) -> CalibratedBlock | None:
        if not self.compensates:
            return None
        from quantkit.methods.ggml_calibrated import GGMLBlock

        return GGMLBlock(given, self)

    def _weighing(self, name: str, given: BlockWeights, statistics: Mapping[str, InputStatistics]) -> Importance | None:
        if self.importance is True and name in statistics:
            return statistics[name].importance
        return given.importance.get(name) if self.importance else None

    def _encode(self, name: str, weight: Tensor, type_name: str, weighing: Importance | None) -> BlockTensor:
        """weight: [out, in]. Raises ModelError naming it when it is not finite or too large for float16 scales."""
        check_finite(f"{name}.weight", weight)
        mean = None
        if weighing is not None:
            mean = weighing.mean
            check_finite(f"inputs of {name}", mean)
        try:
            data = encode(weight, type_name, mean)
        except ModelError as error:
            raise ModelError(f"{name}.weight: {error.message}", hint="--set method.type=bf16") from error
        return BlockTensor(data, type_name, weight.shape[0], weight.shape[1], weighing if self.calibrated else None)


class PlacedGGML(GGML):
    """The settings as they apply to one linear of one model: what `GGML.placed` gives, never written in a recipe.

    wanted_type: ggml's type by the mix's rules. dataset, chunks: what an importance that is calibrated comes from.
    """

    wanted_type: str
    dataset: str
    chunks: int

    @property
    def wanted(self) -> str:
        return self.wanted_type

    def of_block(self) -> Method:
        """Linears of one input are scaled and rounded together under rounding gptq, whatever their types."""
        if not self.compensates:
            return self
        return self.model_copy(update={"wanted_type": MIXES.get(self.type, self.file_type)})
