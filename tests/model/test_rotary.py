"""Rotary positions by the compiled loop: the very numbers of the model's own function, or that function."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_neighbours
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as rotate_qwen3

from quantkit.model import rotary
from quantkit.model.rotary import CompiledRotation, use_compiled_rotation

Rotate = Callable[..., tuple[Tensor, Tensor]]


def heads(count: int, dtype: torch.dtype, length: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(2, length, count, 16, generator=generator).to(dtype).transpose(1, 2)


def tables(length: int = 70) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length), torch.logspace(0, -3, 8)).repeat(1, 2)[None]
    return angles.cos(), angles.sin()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that the loop sees."""
    seen: list[torch.dtype] = []
    loop = rotary._rotated

    def note(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        seen.append(heads.dtype)
        return loop(heads, cos, sin)

    monkeypatch.setattr(rotary, "_rotated", note)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [apply_rotary_pos_emb, rotate_qwen3])
def test_the_loop_gives_the_numbers_of_the_models_function(
    own: Rotate, dtype: torch.dtype, calls: list[torch.dtype]
) -> None:
    rotation = CompiledRotation(own)
    for _ in range(2):
        given = (heads(6, dtype), heads(2, dtype), *tables())
        for found, wanted in zip(rotation(*given), own(*given), strict=True):
            assert found.dtype == wanted.dtype == torch.float32
            assert torch.equal(found, wanted)
    assert calls == [dtype] * 4


def test_a_function_that_does_something_else_stays(calls: list[torch.dtype]) -> None:
    rotation = CompiledRotation(rotate_neighbours)
    for _ in range(3):
        given = (heads(6, torch.float32), heads(2, torch.float32), *tables())
        for found, wanted in zip(rotation(*given), rotate_neighbours(*given), strict=True):
            assert torch.equal(found, wanted)
    assert len(calls) == 2, "queries and keys, asked once"


@pytest.mark.parametrize("first", ["one position", "zeros"])
def test_inputs_that_tell_nothing_decide_nothing(first: str) -> None:
    rotation = CompiledRotation(rotate_neighbours)
    length = 1 if first == "one position" else 70
    query, key = (heads(count, torch.float32, length) * (first != "zeros") for count in (6, 2))
    rotation(query, key, *tables(length))
    given = (heads(6, torch.float32), heads(2, torch.float32), *tables())
    for found, wanted in zip(rotation(*given), rotate_neighbours(*given), strict=True):
        assert torch.equal(found, wanted)


def test_a_function_with_another_signature_gets_what_it_was_given() -> None:
    rotation = CompiledRotation(lambda states, cos, sin, scale=1: states * cos * sin * scale)
    states, (cos, sin) = torch.ones(1, 70, 16), tables()
    assert torch.equal(rotation(states, cos, sin), cos * sin)
    assert torch.equal(rotation(states, cos=cos, sin=sin, scale=2), 2 * cos * sin)


def test_what_the_loop_is_not_made_for_goes_the_models_way(calls: list[torch.dtype]) -> None:
    rotation, (cos, sin) = CompiledRotation(apply_rotary_pos_emb), tables()
    query, key = heads(6, torch.float32), heads(2, torch.float32)
    rotation(query.half(), key.half(), cos, sin)
    rotation(query, key, cos.half(), sin.half())
    rotation(query, key, cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    rotation(query.contiguous(), key.contiguous(), cos, sin)
    rotation(query.transpose(1, 2), key.transpose(1, 2), cos, sin, 2)
    assert not calls


def test_an_attention_keeps_its_class_and_others_their_function(calls: list[torch.dtype]) -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa")
    torch.manual_seed(0)
    module, plain = LlamaAttention(config, 0), nn.Linear(3, 3)
    other = copy.deepcopy(module)
    use_compiled_rotation([module, plain])
    use_compiled_rotation([module])  # once more
    assert isinstance(module, LlamaAttention) and type(module).__name__ == "LlamaAttention"
    assert type(other) is LlamaAttention and type(plain) is nn.Linear
    with torch.inference_mode():
        states = torch.randn(2, 70, 96)
        found = module(states, position_embeddings=tables(), attention_mask=None)[0]
        assert len(calls) == 2
        assert torch.equal(found, other(states, position_embeddings=tables(), attention_mask=None)[0])
        assert len(calls) == 2
        assert torch.equal(found, copy.deepcopy(module)(states, position_embeddings=tables(), attention_mask=None)[0])
        assert len(calls) == 4
