"""Norms by the compiled loop: only where it says what the module itself does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from quantkit.maths import norm_kernel
from quantkit.model.norms import CompiledNorm, use_compiled_norms

INPUTS = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 24)


def norm(kind: type[nn.Module] = LlamaRMSNorm) -> nn.Module:
    made = kind(24)
    made.weight = nn.Parameter(torch.linspace(0.2, 3, 24))
    use_compiled_norms([made])
    return made


def exact(module: nn.Module, states: Tensor, offset: float = 0.0) -> Tensor:
    wide, gains = states.double(), module.weight.detach().double() + offset
    return (wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gains).float()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the loop sees."""
    seen: list[tuple[int, ...]] = []
    loop = norm_kernel.rms_norm

    def note(count: int, rows: object, *rest: object) -> None:
        assert count == len(rows)  # type: ignore[arg-type]
        seen.append(rows.shape)  # type: ignore[attr-defined]
        loop(count, rows, *rest)

    monkeypatch.setattr(norm_kernel, "rms_norm", note)
    return seen


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_the_loop_takes_the_place_of_a_norm_that_it_agrees_with(
    kind: type[nn.Module], calls: list[tuple[int, ...]]
) -> None:
    module = norm(kind)
    with torch.inference_mode():
        for states in (INPUTS, INPUTS[:1], INPUTS.transpose(0, 1)):
            torch.testing.assert_close(module(states), exact(module, states), rtol=1e-5, atol=1e-6)
    assert calls == [(21, 24), (7, 24), (21, 24)]
    assert isinstance(module, kind) and type(module).__name__ == kind.__name__


def test_the_same_inputs_give_the_same_outputs_the_first_time_too() -> None:
    module = norm()
    with torch.inference_mode():
        assert torch.equal(module(INPUTS), module(INPUTS))


def test_a_norm_that_does_something_else_keeps_its_own_way(calls: list[tuple[int, ...]]) -> None:
    module = norm(GemmaRMSNorm)  # adds one to the gains
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(module(INPUTS), exact(module, INPUTS, offset=1.0), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1, "asked once"


def test_rows_of_zeros_decide_nothing(calls: list[tuple[int, ...]]) -> None:
    module = norm(GemmaRMSNorm)
    with torch.inference_mode():
        module(torch.zeros_like(INPUTS))
        begun_with_zeros = torch.cat([torch.zeros(100, 24), INPUTS.view(-1, 24)])
        torch.testing.assert_close(
            module(begun_with_zeros), exact(module, begun_with_zeros, offset=1.0), rtol=1e-5, atol=1e-6
        )
    assert len(calls) == 2, "not decided by the first"


def test_other_dtypes_and_modules_are_left_alone(calls: list[tuple[int, ...]]) -> None:
    plain, half = nn.LayerNorm(24), norm().bfloat16()
    use_compiled_norms([plain])
    assert not isinstance(plain, CompiledNorm)
    with torch.inference_mode():
        assert half(INPUTS.bfloat16()).dtype == torch.bfloat16
    assert not calls


def test_a_copy_goes_through_the_loop_with_gains_of_its_own(calls: list[tuple[int, ...]]) -> None:
    module = norm()
    twin = copy.deepcopy(module)
    twin.weight = nn.Parameter(torch.ones(24))
    with torch.inference_mode():
        torch.testing.assert_close(twin(INPUTS), exact(twin, INPUTS), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
