"""Speculative decoding: what the baseline accepts of a draft."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles.memory_source import MemorySource, store
from quantkit.bench import speculative
from quantkit.bench.divergence import ids_path
from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run
from quantkit.bench.subject import Artifact, Baseline
from quantkit.formats import open_artifact
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.model.reader import open_source
from quantkit.sections import SpeculativeBench

SECTION = SpeculativeBench(prompts=2, prompt_tokens=8, decode_tokens=24, draft_tokens=3)
CPU = torch.device("cpu")


def _prompts() -> torch.Tensor:
    return torch.randint(384, (2, 8), generator=torch.Generator().manual_seed(4))


def _measured(model: Path, artifact: Path, scratch: Path) -> dict[str, Measurement]:
    np.save(ids_path(scratch, SECTION), _prompts().numpy())
    run = Run(Artifact(artifact, "not used here"), False, CPU, scratch, model, model)
    return {one.metric: one for one in speculative.measure(SECTION, run)}


def _artifact(model: Path, folder: Path, type_: str) -> Path:
    store(MemorySource(model), GGUF(), folder, GGML(type=type_), torch.float16)
    return folder


def test_a_draft_that_says_the_same_is_accepted_whole(tiny_llama: Path, tmp_path: Path) -> None:
    found = _measured(tiny_llama, _artifact(tiny_llama, tmp_path / "q", "f16"), tmp_path)
    assert found["acceptance"].value == pytest.approx(
        1.0, abs=0.15
    )  # half precision moves a few near ties of a random model
    assert found["draft_speedup"].value is not None and found["draft_speedup"].value > 0
    assert found["acceptance"].engine == "decoded weights"
    assert found["acceptance"].settings["without_engine"] == "not used here"


def test_acceptance_is_that_of_drafting_by_hand(tiny_llama: Path, tmp_path: Path) -> None:
    path = _artifact(tiny_llama, tmp_path / "q", "q2_k")
    found = _measured(tiny_llama, path, tmp_path)["acceptance"]
    target = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    draft = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    artifact = open_artifact(path)
    draft.load_state_dict({name: artifact.read(name).float() for name in artifact.names()})
    shares = [_by_hand(target, draft, prompt) for prompt in _prompts()]
    assert found.value == pytest.approx(sum(shares) / 2, abs=1e-6)
    assert 0 < found.value < 0.9, "the artifact has to differ for the test to mean something"


def _by_hand(target: torch.nn.Module, draft: torch.nn.Module, prompt: torch.Tensor) -> float:
    """Greedy drafting, one round after another: what is accepted over what is drafted."""
    ids, made, accepted, drafted = prompt, 0, 0, 0
    while made < SECTION.decode_tokens:
        room = min(SECTION.draft_tokens, SECTION.decode_tokens - made - 1)
        guess = ids
        for _ in range(room):
            guess = torch.cat([guess, _next(draft, guess)[-1:]])
        drafted += room
        wanted = _next(target, guess)[len(ids) - 1 :]  # the target's own token at each place
        right = 0
        while right < room and guess[len(ids) + right] == wanted[right]:
            right += 1
        accepted += right
        made += right + 1
        ids = torch.cat([ids, wanted[: right + 1]])
    return accepted / drafted


def _next(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0].argmax(-1)  # type: ignore[no-any-return]


def test_the_baseline_drafts_for_nobody(tiny_llama: Path, tmp_path: Path) -> None:
    run = Run(Baseline(open_source(str(tiny_llama))), True, CPU, tmp_path, tiny_llama)
    assert speculative.measure(SECTION, run) == []
