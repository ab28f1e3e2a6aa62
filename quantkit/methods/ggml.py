"""ggml's block types: round to nearest in the blocks that GGUF files hold; no calibration.

Source: llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml import block_layout, encode, type_size
from quantkit.maths.gram import InputStatistics
from quantkit.methods.base import BlockResult, BlockWeights, Method, check_finite
from quantkit.tensors import BlockTensor


class GGML(Method):
    """Every linear in one ggml type; the embedding, which may also be the head, in another."""

    name: Literal["ggml"] = "ggml"
    type: Literal["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = "q8_0"
    embedding_type: Literal["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = "q8_0"

    @property
    def type_name(self) -> str:
        """ggml's own name of the type, such as "Q4_0"."""
        return self.type.upper()

    def label(self) -> str:
        return f"gguf {self.type_name}"

    def misfit(self, out_features: int, in_features: int) -> str | None:
        block, _ = block_layout(self.type_name)
        if in_features % block:
            return f"type {self.type}: its block of {block} does not divide in_features {in_features}"
        return None

    def predicted_bits(self, out_features: int, in_features: int) -> float:
        return type_size(self.type_name, in_features) * 8 / in_features

    def quantize_block(self, given: BlockWeights, statistics: Mapping[str, InputStatistics]) -> BlockResult:
        quantized = {name: self._encode(name, weight) for name, weight in given.weights.items()}
        return BlockResult(quantized, dict.fromkeys(quantized, self.label()))

    def _encode(self, name: str, weight: Tensor) -> BlockTensor:
        """weight: [out, in]. Raises ModelError naming it when it is not finite or too large for float16 scales."""
        check_finite(f"{name}.weight", weight)
        try:
            data = encode(weight, self.type_name)
        except ModelError as error:
            raise ModelError(f"{name}.weight: {error.message}", hint="--set method.type=bf16") from error
        return BlockTensor(data, self.type_name, weight.shape[0], weight.shape[1])
