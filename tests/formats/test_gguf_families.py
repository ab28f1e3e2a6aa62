"""Every family in GGUF: llama.cpp's logits are those of transformers, and the file read back is the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes.families import SETTINGS, family_config, write_family
from oracles import llama_cpp
from oracles.memory_source import MemorySource, plans_of, store
from quantkit.errors import ModelError
from quantkit.formats.base import LinearPlan
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.model.gguf_config import metadata_of_config
from quantkit.model.gguf_source import GGUFSource
from quantkit.model.load import load_transformers
from quantkit.model.source import Source

FLOAT_ERROR = 3e-3
"""Largest relative error of logits from float files: llama.cpp keeps keys, values and a table of gelu in float16."""

Q8_ERROR = 5e-2
"""The same from Q8_0, whose products round weights and activations to 8 bits."""

IDS = [5, 300, 17, 42, 99, 7, 201, 12, 64, 3, 350, 8, *range(100, 150)]
"""Longer than the window of the models that have one."""


def _written(source: Source, folder: Path, type_name: str) -> Path:
    """A GGUF file with the linears in one type and the rest in float32, or all in float32."""
    if type_name != "f32":
        method = GGML(type=type_name, embedding_type=type_name)  # type: ignore[arg-type]
        (path,), _ = store(source, GGUF(), folder, method, torch.float32, head=method)
        return path
    folder.mkdir()
    plans = [LinearPlan(plan.name, plan.out_features, plan.in_features, None) for plan in plans_of(source, GGML())]
    assert GGUF().misfits(plans, source) == []
    writer = GGUF().writer(folder, source, plans, torch.float32)
    for name in source.names():
        if name != "lm_head.weight" or not source.tied_head:
            writer.add(name, source.read(name))
    (path,) = writer.finish()
    return path


def _logits(source: Source, ids: list[int]) -> torch.Tensor:
    """Logits of transformers after every token: float32 [tokens, vocabulary]."""
    with torch.no_grad():
        return load_transformers(source, torch.float32)(torch.tensor([ids])).logits[0]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.std() > 0.3  # so that a tolerance means something
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def _llama_cpp(path: Path, ids: list[int]) -> torch.Tensor:
    with llama_cpp.Model(path) as model:
        return torch.from_numpy(model.logits(ids))


@pytest.mark.engine
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("type_name", "tolerance"), [("f32", FLOAT_ERROR), ("f16", FLOAT_ERROR), ("q8_0", Q8_ERROR)])
def test_llama_cpp_computes_the_same(
    tiny_llama: Path, tmp_path: Path, kind: str, type_name: str, tolerance: float
) -> None:
    source = MemorySource(write_family(tmp_path / "model", kind, tiny_llama))
    path = _written(source, tmp_path / "out", type_name)
    error = _error(_llama_cpp(path, IDS), _logits(source, IDS))
    print(f"{kind} {type_name} {error:.2e}")
    assert error < tolerance


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("type_name", ["f32", "f16"])
def test_the_file_read_back_is_the_model(tiny_llama: Path, tmp_path: Path, kind: str, type_name: str) -> None:
    source = MemorySource(write_family(tmp_path / "model", kind, tiny_llama))
    back = GGUFSource(_written(source, tmp_path / "out", type_name))
    stored = [name for name in source.names() if name != "lm_head.weight" or not source.tied_head]
    assert sorted(back.names()) == sorted(stored)
    for name in stored:
        assert back.shape(name) == source.shape(name)
        assert torch.equal(back.read(name).float(), source.read(name)), name
    torch.testing.assert_close(_logits(back, IDS), _logits(source, IDS), rtol=0, atol=1e-5)


LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
LONGROPE: dict[str, object] = dict(
    rope_scaling=dict(
        type="longrope", short_factor=[1.0 + 0.5 * i for i in range(8)], long_factor=[2.0 + i for i in range(8)]
    )
)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=8192))),
    "llama-linear": ("llama", dict(rope_parameters=LINEAR)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-old-names": ("llama", dict(rope_scaling=dict(type="linear", factor=2.0), rope_theta=5000.0)),
    "mistral-yarn": ("mistral", dict(rope_parameters=YARN)),
    "qwen2-yarn": ("qwen2", dict(rope_parameters=YARN)),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-linear": ("qwen2", dict(rope_parameters=LINEAR)),
    "qwen3-yarn": ("qwen3", dict(rope_parameters=YARN)),
    "qwen3-linear": ("qwen3", dict(rope_parameters=LINEAR)),
    "gemma2-window": ("gemma2", dict(sliding_window=24)),
    "gemma2-caps": ("gemma2", dict(attn_logit_softcapping=1.0)),
    "gemma3-window": ("gemma3_text", dict(sliding_window=24)),
    "gemma2-linear": ("gemma2", dict(rope_parameters=LINEAR)),
    "gemma2-period": ("gemma2", dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"])),
    "gemma3-linear": (
        "gemma3_text",
        dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=500.0),
            )
        ),
    ),
    "gemma3-period": (
        "gemma3_text",
        dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    # llama.cpp takes the factors by the context it was opened with, here 256, and not by the text
    "phi3-longrope": ("phi3", LONGROPE | dict(original_max_position_embeddings=256, max_position_embeddings=512)),
    "phi3-longrope-beyond": ("phi3", LONGROPE | dict(original_max_position_embeddings=32)),
    "phi3-partial": ("phi3", dict(partial_rotary_factor=0.5)),
    "phi3-tied": ("phi3", dict(tie_word_embeddings=True)),
    "gpt2-narrow": ("gpt2", dict(n_inner=96)),
    "gpt2-untied": ("gpt2", dict(tie_word_embeddings=False)),
    "gemma3-untied": ("gemma3_text", dict(tie_word_embeddings=False)),
}


@pytest.mark.engine
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_their_logits(tiny_llama: Path, tmp_path: Path, variant: str) -> None:
    kind, changes = VARIANTS[variant]
    source = MemorySource(write_family(tmp_path / "model", kind, tiny_llama, **changes))
    path = _written(source, tmp_path / "out", "f32")
    expected = _logits(source, IDS)
    plain = MemorySource(write_family(tmp_path / "plain", kind, tiny_llama))
    error = _error(_llama_cpp(path, IDS), expected)
    print(f"{variant} {error:.2e}")
    assert error < FLOAT_ERROR
    if "tied" not in variant:
        assert _error(_logits(plain, IDS), expected) > 3 * FLOAT_ERROR  # the variant can be told from the plain model
    torch.testing.assert_close(_logits(GGUFSource(path), IDS), expected, rtol=0, atol=1e-4)


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "yarn's range": ("qwen2", dict(rope_parameters=YARN | dict(beta_fast=8.0)), "beta_fast: 8.0, expected 32"),
    "yarn's scale": ("llama", dict(rope_parameters=YARN | dict(attention_factor=1.0)), "expected 1.13863"),
    "dynamic": ("llama", dict(rope_parameters=LINEAR | dict(rope_type="dynamic")), "rope_type: dynamic cannot be"),
    "llama3 elsewhere": (
        "qwen2",
        dict(rope_parameters=LLAMA3),
        "rope_type: llama3 cannot be written .* Qwen2ForCausal",
    ),
    "part rotated": ("llama", dict(rope_parameters=LINEAR | dict(partial_rotary_factor=0.5)), "8 of 16 channels"),
    "biases": ("qwen3", dict(attention_bias=True), "attention_bias: True; llama.cpp computes False"),
    "heads": ("qwen2", dict(head_dim=32), "4 heads of 32 channels"),
    "activation": ("llama", dict(hidden_act="gelu"), "hidden_act: gelu; llama.cpp computes silu"),
    "scale": ("gemma2", dict(query_pre_attn_scalar=64), "query_pre_attn_scalar: 64; llama.cpp computes 32"),
    "no cap": ("gemma2", dict(final_logit_softcapping=None), "final_logit_softcapping: missing or null"),
    "cap": ("gemma3_text", dict(final_logit_softcapping=30.0), "final_logit_softcapping: 30.0"),
    "order": (
        "gemma3_text",
        dict(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        "layer_types: full_attention, sliding_attention",
    ),
    "longrope elsewhere": ("qwen2", LONGROPE, "rope_type: longrope cannot be written"),
    "inverse scale": (
        "gpt2",
        dict(scale_attn_by_inverse_layer_idx=True),
        "by_inverse_layer_idx: True; .* False for GPT2",
    ),
    "no scale": ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights: False; llama.cpp computes True"),
    "local scaling": (
        "gemma3_text",
        dict(rope_parameters=dict(sliding_attention=LINEAR)),
        "sliding_attention: rope_type: linear",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(reason: str) -> None:
    kind, changes, message = REFUSED[reason]
    with pytest.raises(ModelError, match=message):
        metadata_of_config(family_config(kind, **changes))


def test_factors_of_longrope_are_counted() -> None:
    config = family_config("phi3", **LONGROPE, original_max_position_embeddings=32)
    config["rope_parameters"]["short_factor"] = [1.0] * 7
    with pytest.raises(ModelError, match="short_factor: 7 values; expected 8"):
        metadata_of_config(config)


def test_the_one_size_whose_attention_has_another_scale() -> None:
    size = dict(num_hidden_layers=46, hidden_size=72, num_attention_heads=4, head_dim=32)
    assert metadata_of_config(family_config("gemma2", **size, query_pre_attn_scalar=18))["block_count"] == 46
    with pytest.raises(ModelError, match="computes 18"):
        metadata_of_config(family_config("gemma2", **size, query_pre_attn_scalar=32))


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context() -> None:
    assert metadata_of_config(family_config("mistral", sliding_window=64))["context_length"] == 64
    assert metadata_of_config(family_config("mistral", sliding_window=None))["context_length"] == 256
    windows: dict[str, object] = dict(use_sliding_window=True, sliding_window=64)
    assert metadata_of_config(family_config("qwen2", **windows, max_window_layers=1))["context_length"] == 64
    assert metadata_of_config(family_config("qwen2", **windows, max_window_layers=3))["context_length"] == 256
    assert metadata_of_config(family_config("gemma2"))["context_length"] == 256


def test_a_file_that_sets_what_its_family_lacks_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    source = MemorySource(write_family(tmp_path / "model", "gemma3_text", tiny_llama))
    path = _written(source, tmp_path / "out", "f32")
    data = path.read_bytes()
    name, other = b"gemma3.attention.value_length", b"gemma3.final_logit_softcapping"
    assert data.count(name) == 1
    at = data.index(name)
    changed = data[: at - 8] + len(other).to_bytes(8, "little") + other + data[at + len(name) :]
    path.write_bytes(changed)
    with pytest.raises(ModelError, match=r"gemma3\.final_logit_softcapping: 32; expected a model without it"):
        GGUFSource(path)
