"""Gated MLPs by the compiled loop: those that say the same, and what comes out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from quantkit.model.gates import CompiledGate, silu_times, use_compiled_gates


def mlp(kind: Any, activation: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=40, mlp_bias=False)
    made: nn.Module = kind(SimpleNamespace(**sizes, hidden_act=activation, hidden_activation=activation))
    use_compiled_gates([made])
    return made


@pytest.mark.parametrize("kind", [LlamaMLP, MistralMLP, Qwen3MLP])
def test_the_loop_takes_the_place_of_silu_and_the_product(kind: Any) -> None:
    module = mlp(kind, "silu")
    assert isinstance(module, CompiledGate) and isinstance(module, kind)
    states = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(module(states), kind.forward(module, states), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "activation"), [(GemmaMLP, "gelu_pytorch_tanh"), (LlamaMLP, "relu"), (Phi3MLP, "silu")]
)
def test_others_keep_theirs(kind: Any, activation: str) -> None:
    assert type(mlp(kind, activation)) is kind


def test_a_forward_that_asks_for_more_is_not_taken() -> None:
    class Halved(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
            return down_proj

    class Optional(LlamaMLP):
        def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return down_proj

    for kind in (Halved, Optional):
        assert type(mlp(kind, "silu")) is kind


def test_an_activation_that_may_be_more_is_not_asked() -> None:
    class Scaled(nn.SiLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it may want inputs of another kind")

    made = LlamaMLP(SimpleNamespace(hidden_size=24, intermediate_size=40, mlp_bias=False, hidden_act="silu"))
    made.act_fn = Scaled()
    use_compiled_gates([made])
    assert type(made) is LlamaMLP


def test_inputs_may_lie_in_any_order() -> None:
    turned, whole = torch.randn(40, 6).T, torch.randn(6, 40)
    torch.testing.assert_close(silu_times(whole, turned), nn.functional.silu(whole) * turned)
    wanted = nn.functional.silu(turned) * whole
    torch.testing.assert_close(silu_times(turned, whole), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    gate, up = ((torch.randn(3, 7, 33, generator=generator) * 30).to(dtype) for _ in range(2))
    gate[0, 0, :3] = torch.tensor([0.0, 200.0, -200.0])
    exact = nn.functional.silu(gate.double()) * up.double()
    found = silu_times(gate, up)
    assert found is up, "what the linear gave is not held beside it"
    assert found.dtype == dtype
    # of exponents up to a hundred, float32 keeps five digits behind the point; bfloat16 is rounded to once
    step = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert bool(((found.double() - exact).abs() <= step * exact.abs() + 1e-30).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_pass_for_a_number(bad: float) -> None:
    gate, up = torch.ones(2, 20), torch.ones(2, 20)
    gate[0, 3], up[1, 4] = bad, bad
    found = silu_times(gate, up)
    assert found.isfinite().logical_not().nonzero().tolist() == [[0, 3], [1, 4]]
