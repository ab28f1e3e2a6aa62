"""Divergence against plain computations; nothing against itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles.memory_source import MemorySource, store
from quantkit.bench.divergence import compare, ids_path, measure, standard_error
from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run
from quantkit.bench.subject import Artifact, Baseline
from quantkit.engines import llama_api
from quantkit.formats import open_artifact
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.model.reader import open_source
from quantkit.sections import DivergenceBench

SECTION = DivergenceBench(sequences=3, length=24)


def _ids() -> torch.Tensor:
    return torch.randint(384, (3, 24), generator=torch.Generator().manual_seed(4))


def _run(subject: Baseline | Artifact, scratch: Path, folder: Path) -> dict[str, Measurement]:
    np.save(ids_path(scratch, SECTION), _ids().numpy())
    run = Run(subject, isinstance(subject, Baseline), torch.device("cpu"), scratch, folder)
    return {found.metric: found for found in measure(SECTION, run)}


def _quantized(model: Path, folder: Path) -> Path:
    store(MemorySource(model), GGUF(), folder, GGML(type="q4_0"), torch.float16)
    return folder


def test_perplexity_is_that_of_a_plain_loop(tiny_llama: Path, tmp_path: Path) -> None:
    found = _run(Baseline(open_source(str(tiny_llama))), tmp_path, tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    losses = []
    with torch.inference_mode():
        for row in _ids():
            logits = model(row[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]).item())
    value = math.exp(sum(losses) / 3)
    assert list(found) == ["perplexity"]
    assert found["perplexity"].value == pytest.approx(value, rel=1e-5)
    spread = value * float(np.std(losses, ddof=1)) / math.sqrt(3)
    assert found["perplexity"].error == pytest.approx(spread, rel=1e-3)
    assert found["perplexity"].samples == 3


def test_kl_and_agreement_are_those_of_a_plain_loop(tiny_llama: Path, tmp_path: Path) -> None:
    path = _quantized(tiny_llama, tmp_path / "q")
    _run(Baseline(open_source(str(tiny_llama))), tmp_path, tiny_llama)
    found = _run(Artifact(path, "not used here"), tmp_path, tiny_llama)
    before = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    after = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    artifact = open_artifact(path)
    after.load_state_dict({name: artifact.read(name) for name in artifact.names()})
    with torch.inference_mode():
        p, q = (model(_ids()).logits[:, :-1].log_softmax(-1) for model in (before, after))
    kl = (p.exp() * (p - q)).sum(-1)
    assert float(kl.mean()) > 1e-4, "the artifact has to differ for the test to mean something"
    assert found["kl"].value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl"].error == pytest.approx(float(kl.mean(1).std() / math.sqrt(3)), rel=1e-3)
    assert found["top1"].value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-6)
    assert found["kl"].engine == "decoded weights"
    assert found["kl"].settings["without_engine"] == "not used here"


@pytest.mark.skipif(llama_api.installed() != llama_api.VERSION, reason="xllamacpp is not installed")
@pytest.mark.engine
def test_a_gguf_file_is_measured_by_the_logits_of_llama_cpp(tiny_llama: Path, tmp_path: Path) -> None:
    path = _quantized(tiny_llama, tmp_path / "q")
    _run(Baseline(open_source(str(tiny_llama))), tmp_path, tiny_llama)
    torch.set_num_threads(1)  # llama.cpp's threads wait for each other, which takes long on a busy machine
    own = _run(Artifact(path), tmp_path, tiny_llama)
    decoded = _run(Artifact(path, "not used here"), tmp_path, tiny_llama)
    for metric in ("perplexity", "kl", "top1"):
        assert own[metric].engine == "llama.cpp" and decoded[metric].engine == "decoded weights"
        assert own[metric].settings["repacking"] in (True, "off: crashes with AMX")
        assert "without_engine" not in own[metric].settings
    # activations in 8 bits: another number, by a little of what the rounding of the weights costs
    assert own["kl"].value != decoded["kl"].value
    assert own["kl"].value == pytest.approx(decoded["kl"].value, rel=0.1)
    assert own["perplexity"].value == pytest.approx(decoded["perplexity"].value, rel=0.01)


def test_a_model_does_not_diverge_from_itself(tiny_llama: Path, tmp_path: Path) -> None:
    _run(Baseline(open_source(str(tiny_llama))), tmp_path, tiny_llama)
    np.save(ids_path(tmp_path, SECTION), _ids().numpy())
    run = Run(Baseline(open_source(str(tiny_llama))), False, torch.device("cpu"), tmp_path, tiny_llama)
    found = {one.metric: one for one in measure(SECTION, run)}
    assert found["kl"].value == 0.0 and found["top1"].value == 1.0


def test_without_a_baseline_the_reason_stands_there(tiny_llama: Path, tmp_path: Path) -> None:
    found = _run(Artifact(_quantized(tiny_llama, tmp_path / "q"), "not used here"), tmp_path, tiny_llama)
    assert found["perplexity"].value is not None
    assert found["kl"].value is None and found["kl"].missing == "the baseline was not measured on this text"


def test_compare_sums_over_blocks_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(150, 11, generator=generator).log_softmax(-1)
    q = torch.randn(150, 11, generator=generator).log_softmax(-1)
    kl, agreement = compare(p, q)
    exact = torch.nn.functional.kl_div(q.double(), p.double(), log_target=True, reduction="none").sum(-1)
    assert kl == pytest.approx(float(exact.mean()), rel=1e-5)
    assert agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_one_sequence_has_no_standard_error() -> None:
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
