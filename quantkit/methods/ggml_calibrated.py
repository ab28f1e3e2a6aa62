"""One block of a model rounded onto the grids of ggml's types with GPTQ's error compensation.

The encoder of a type chooses scales and minima, weighed by the diagonal of the Gram matrix; the codes are then chosen
again by the whole of it, and all of them improved in turn (maths/ggml_compensate.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.maths.ggml import FLOAT_TYPES, encode
from quantkit.maths.ggml_codes import LAYOUTS, put, take
from quantkit.maths.ggml_compensate import compensate_codes, refine_blocks
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
        # what the search for scales takes the grid to be; every linear then has its own
        grid = Grid(layout.bits, layout.group, not layout.has_minimum)
        steps = Steps(
            grid,
            exponents=method.exponents,
            scales=method.scales,
            search_range=True,
            compensate=True,
            damp=method.damp,
            act_order=True,
            refine=method.refine,
            correction=method.correction,
        )
        super().__init__(given, steps)
        self._types = {}
        for name, weight in given.weights.items():
            own = given.methods.get(name, method)
            assert isinstance(own, GGML)
            self._types[name] = own.type_for(weight.shape[1])
            if self._types[name] != own.wanted:
                self._note([name], misfit_reason(own.wanted, weight.shape[1]))

    def label(self, linear: str) -> str:
        type_name = self._types[linear]
        return f"gguf {type_name}{'' if type_name in FLOAT_TYPES else ' gptq'}"

    def _round(self, ours: list[str], gram: Tensor) -> Mapping[str, QuantizedTensor]:
        """Linears of one input and one type are stacked by rows; the Gram matrix is factored once for all."""
        steps = self.steps
        importance = gram.diagonal() / gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        by_type: dict[str, list[str]] = {}
        for name in ours:
            by_type.setdefault(self._types[name], []).append(name)
        stacked = {type_name: self._stacked(names) for type_name, names in by_type.items()}
        made = {
            type_name: _encoded(weight, type_name, importance, by_type[type_name])
            for type_name, weight in stacked.items()
        }
        coded = {type_name: take(data, type_name) for type_name, data in made.items() if type_name not in FLOAT_TYPES}
        with self._factored(ours, gram) as factor:
            for type_name, blocks in coded.items():
                coded[type_name] = compensate_codes(stacked[type_name], blocks, type_name, factor)
        if steps.refine:
            with damped(gram, factor.damp) as matrix:
                for type_name, blocks in coded.items():
                    coded[type_name] = refine_blocks(stacked[type_name], blocks, type_name, matrix, steps.refine)
        made |= {type_name: put(blocks, type_name) for type_name, blocks in coded.items()}
        rounded = {}
        for type_name, names in by_type.items():
            for name, rows in self.rows_of(names).items():
                rounded[name] = BlockTensor(made[type_name][rows], type_name, *self.weights[name].shape)
        return rounded


def _encoded(weight: Tensor, type_name: str, importance: Tensor, linears: list[str]) -> Tensor:
    """Stacked weights of some linears in a block type by its encoder. Raises ModelError."""
    try:
        return encode(weight, type_name, importance)
    except ModelError as error:
        raise ModelError(
            f"{', '.join(linears)}: {error.message}", hint=f"the checkpoint may be damaged; else skip {linears[0]}"
        ) from error
