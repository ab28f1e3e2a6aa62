"""One block of a model rounded onto the grids of ggml's types with GPTQ's error compensation.

The encoder of a type chooses scales and minima, weighed by the diagonal of the Gram matrix; the codes are then chosen
again by the whole of it, and all of them improved in turn (maths/ggml_compensate.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.fold import Rounding
from quantkit.maths.ggml import FLOAT_TYPES, encode
from quantkit.maths.ggml_codes import LAYOUTS, put, take
from quantkit.maths.ggml_compensate import compensate_codes, refine_blocks, values_of
from quantkit.maths.refine import damped
from quantkit.methods.base import BlockWeights
from quantkit.methods.calibrated import CalibratedBlock, Steps
from quantkit.methods.ggml import GGML
from quantkit.methods.ggml_mixes import misfit_reason
from quantkit.tensors import BlockTensor, Grid, QuantizedTensor


class GGMLBlock(CalibratedBlock):
    """One block whose linears may have several block types."""

    def __init__(self, given: BlockWeights, method: GGML):
        layout = LAYOUTS[method.wanted]
        # what the search of AWQ's scales takes the grid to be; every linear then has its own
        grid = Grid(layout.bits, layout.group, not layout.has_minimum)
        super().__init__(given, Steps(grid, method.exponents, True, True, method.damp, True, method.refine))
        self._types = {}
        for name, weight in given.weights.items():
            own = given.methods.get(name, method)
            assert isinstance(own, GGML)
            self._types[name] = own.type_for(weight.shape[1])
            if self._types[name] != own.wanted:
                self._note(name, misfit_reason(own.wanted, weight.shape[1]))

    def label(self, linear: str) -> str:
        type_name = self._types[linear]
        return f"gguf {type_name}{'' if type_name in FLOAT_TYPES else ' gptq'}"

    def _trial(self, ours: list[str], gram: Tensor) -> Rounding | None:
        """By the type that most linears of an input have, with error compensation: what that makes up for anyway is no
        reason for a scale."""
        type_name = Counter(self._types[name] for name in ours).most_common(1)[0][0]
        if type_name in FLOAT_TYPES:
            return None
        factor = self._inverse(ours, gram)

        def rounded(scaled: Tensor, scale: Tensor) -> Tensor:
            # (S^-1 H S^-1)^-1 = S U^T U S, if the damping is scaled too
            own = replace(factor, upper=factor.upper * scale[factor.order])
            coded = take(encode(scaled, type_name, _importance(gram.diagonal() / scale.square())), type_name)
            return values_of(compensate_codes(scaled, coded, type_name, own), type_name)

        return rounded

    def _round(self, ours: list[str], gram: Tensor) -> Mapping[str, QuantizedTensor]:
        """Linears of one input and one type are stacked by rows; the Gram matrix is factored once for all."""
        steps = self.steps
        factor = self._factor(ours, gram)
        loaded = damped(gram, factor.damp)
        importance = _importance(gram.diagonal())
        rounded = {}
        for type_name in dict.fromkeys(self._types[name] for name in ours):
            names = [name for name in ours if self._types[name] == type_name]
            stacked = torch.cat([self.weights[name] for name in names])  # [sum of out, in]
            try:
                data = encode(stacked, type_name, importance)
            except ModelError as error:
                raise ModelError(
                    f"{', '.join(names)}: {error.message}", hint=f"the checkpoint may be damaged; else skip {names[0]}"
                ) from error
            if type_name not in FLOAT_TYPES:
                coded = compensate_codes(stacked, take(data, type_name), type_name, factor)
                if steps.refine:
                    coded = refine_blocks(stacked, coded, type_name, loaded, steps.refine)
                data = put(coded, type_name)
            for name, rows in self.rows_of(names).items():
                rounded[name] = BlockTensor(data[rows], type_name, *self.weights[name].shape)
        return rounded


def _importance(squares: Tensor) -> Tensor:
    """Mean squares of the columns, float32 [in], as shares of their mean, so that no type's search leaves float32's
    range."""
    return squares / squares.mean().clamp(min=torch.finfo(torch.float32).tiny)
