"""What a GPU would run, run here: the tensor code in place of the compiled loops, and no tensor made without a device.

A tensor that is made without a device lies on the CPU, whatever the others lie on; that is the mistake which only a
machine with a GPU would show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from quantkit.maths import affine, compensate, refine
from quantkit.maths.gram import GramAccumulator, InputStatistics
from quantkit.methods.awq import AWQ
from quantkit.methods.base import BlockWeights
from quantkit.methods.gptq import GPTQ
from quantkit.model.blocks import ARCHITECTURES, Block

MAKERS = (torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}


class EveryTensorHasADevice(TorchFunctionMode):
    """Fails when a tensor is made without being told where."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in MAKERS or (kwargs or {}).get("device") is not None, f"{function.__name__} on no device"
        return function(*args, **(kwargs or {}))


def _case() -> tuple[BlockWeights, dict[str, InputStatistics]]:
    generator = torch.Generator().manual_seed(0)
    groups = ARCHITECTURES["LlamaForCausalLM"].groups
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    others = {f"{name}.weight": torch.ones(32) for name in ("input_layernorm", "post_attention_layernorm")}
    statistics: dict[str, InputStatistics] = {}
    for group in groups:
        columns = SHAPES[group.linears[0]][1]
        seen = GramAccumulator(columns, torch.device("cpu"))
        seen.add(torch.randn(200, columns, generator=generator) * torch.logspace(-1, 1, columns))
        statistics.update(dict.fromkeys(group.linears, seen.result()))
    block = Block(0, "", tuple(SHAPES), groups, (*(f"{name}.weight" for name in SHAPES), *others))
    return BlockWeights(block, weights, others, head_dim=8), statistics


def test_the_guard_sees_a_tensor_without_a_device() -> None:
    with EveryTensorHasADevice(), pytest.raises(AssertionError, match="zeros on no device"):
        torch.zeros(3)


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(group_size=16),
        GPTQ(group_size=16, symmetric=False, act_order=False),
        AWQ(group_size=16),
        AWQ(group_size=16, rounding="nearest"),
    ],
)
def test_methods_make_every_tensor_where_the_weights_are(method: AWQ | GPTQ, monkeypatch: pytest.MonkeyPatch) -> None:
    given, statistics = _case()
    compiled = method.quantize_block(given, dict(statistics))
    monkeypatch.setattr(compensate, "_round_block", compensate._round_block_tensors)
    monkeypatch.setattr(refine, "_descend_block", refine._descend_block_tensors)
    monkeypatch.setattr(affine, "_best_range", affine._best_range_tensors)
    monkeypatch.setattr(affine, "_best_range_by_blocks", affine._best_range_by_blocks_tensors)
    with EveryTensorHasADevice():
        made = method.quantize_block(given, dict(statistics))
    for name in SHAPES:
        ours, theirs = made.quantized[name], compiled.quantized[name]
        assert (ours.codes != theirs.codes).float().mean() < 0.02, name  # type: ignore[union-attr]


def test_statistics_lie_where_they_are_asked_for() -> None:
    with EveryTensorHasADevice():
        seen = GramAccumulator(16, torch.device("meta"))
        seen.add(torch.empty(4, 8, 16, device="meta"))
        assert seen.result().gram.device.type == "meta"
