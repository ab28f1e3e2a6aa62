"""Sessions in transformers: the primitives agree with each other and with generate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from quantkit.engines import DECODED, ENGINES
from quantkit.engines.base import quality_dtype, speed_dtype
from quantkit.engines.transformers import Transformers, TransformersSession
from quantkit.errors import ModelError
from quantkit.formats import FORMATS
from quantkit.model.load import load_transformers
from quantkit.model.reader import open_source

CPU = torch.device("cpu")


def test_every_engine_that_a_format_names_is_registered() -> None:
    assert {name for known in FORMATS.values() for name in known.engines} <= set(ENGINES)
    assert all(name == engine.name for name, engine in ENGINES.items())
    assert DECODED.name not in ENGINES


def test_prefill_and_decode_follow_generate(tiny_llama: Path) -> None:
    session = TransformersSession(load_transformers(open_source(str(tiny_llama)), torch.float32), "transformers")
    prompts = torch.tensor([[5, 17, 200, 383], [9, 64, 31, 77]])
    tokens = session.prefill(prompts)
    made = [tokens]
    for _ in range(3):
        made.append(session.decode(made[-1]))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = session.model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)  # type: ignore[operator, union-attr]
    assert torch.equal(torch.stack(made, dim=1), expected[:, 4:])
    assert torch.equal(session.logits(prompts[1])[-1].argmax(), tokens[1])


def test_a_new_prefill_forgets_the_old_prompt(tiny_llama: Path) -> None:
    session = TransformersSession(load_transformers(open_source(str(tiny_llama)), torch.float32), "transformers")
    prompt = torch.tensor([[5, 17, 200]])
    first = session.prefill(prompt)
    session.decode(first)
    assert torch.equal(session.prefill(prompt), first)
    session.close()
    assert not hasattr(session, "model") or session.model is None


def test_a_folder_that_transformers_refuses_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=str(broken)):
        Transformers().load(broken, CPU, torch.float32)


def test_half_precision_is_for_machines_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert speed_dtype(CPU, torch.float16) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert speed_dtype(CPU, torch.float16) == torch.bfloat16
    assert speed_dtype(CPU, torch.float32) == torch.float32
    assert quality_dtype(CPU, torch.float16) == torch.float32
    assert speed_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
