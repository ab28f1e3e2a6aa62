"""compressed-tensors as an engine: what it asks for when absent; its logits are those of the decoded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.bench.subject import Artifact
from quantkit.engines import DECODED, compressed_tensors
from quantkit.engines.compressed_tensors import CompressedTensors
from quantkit.errors import ModelError
from quantkit.jobs import quantize
from quantkit.progress import Progress

CPU = torch.device("cpu")
IDS = torch.randint(384, (24,), generator=torch.Generator().manual_seed(1))
OVERRIDES = {"down_proj": {"bits": 8, "group_size": None}, r"layers\.1.*v_proj": "skip"}
installed = pytest.mark.skipif(
    CompressedTensors().available() is not None, reason="compressed-tensors is not installed"
)


def _make(model: Path, out: Path, symmetric: bool, **more: Any) -> Path:
    method = {"name": "rtn", "bits": 4, "group_size": 32, "symmetric": symmetric}
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({"method": method, "format": {"name": "compressed-tensors"}, **more}))
    settings: dict[str, Any] = {"settings": [], "device": "cpu", "force": False, "progress": Progress(quiet=True)}
    quantize(str(recipe), model=str(model), out=out, **settings)
    return out


def test_when_it_is_absent_it_says_what_to_install(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_tensors, "find_spec", lambda name: None)
    wanted = 'pip install "compressed-tensors==0.20.0"'
    assert CompressedTensors().available() == wanted
    subject = Artifact(_make(tiny_llama, tmp_path / "out", True))
    session = subject.for_quality(CPU)
    assert session.engine == DECODED.name
    with pytest.raises(Exception, match="compressed-tensors is not installed: " + wanted):
        subject.for_speed(CPU)


@installed
@pytest.mark.engine
@pytest.mark.parametrize(
    ("symmetric", "more"), [(True, {}), (True, {"overrides": OVERRIDES}), (True, {"skip": []}), (False, {})]
)
def test_logits_are_those_of_the_decoded_weights(
    symmetric: bool, more: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = _make(tiny_llama, tmp_path / "q", symmetric, **more)
    session = CompressedTensors().load(folder, CPU, torch.float32)
    logits = session.logits(IDS)
    decoded = DECODED.load(folder, CPU, torch.float32)
    expected = decoded.logits(IDS)
    assert expected.abs().max() > 1
    if symmetric:
        assert torch.equal(logits, expected) and session.details == {"weights": "decoded at the first pass"}
    else:  # the package multiplies codes and scales in the dtype of the scales, which keeps 11 bits
        assert 0 < (logits - expected).abs().max() < 0.01 and session.details == {"weights": "decoded while loading"}
    tokens = session.prefill(IDS[None])
    assert torch.equal(session.decode(tokens), decoded.decode(decoded.prefill(IDS[None])))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(1, 24)}
    made = session.model.generate(IDS[None], **settings)  # type: ignore[operator, union-attr]
    assert made.shape[1] > 24 and made[0, 24] == tokens[0]
    session.close()


@installed
@pytest.mark.engine
def test_what_the_reader_cannot_load_is_said_and_its_quality_measured(tiny_llama: Path, tmp_path: Path) -> None:
    """Asymmetric with several grids: transformers 5.23 refuses packed zeros, or would take one grid for all."""
    folder = _make(tiny_llama, tmp_path / "q", False, overrides=OVERRIDES)
    with pytest.raises(ModelError, match="transformers refuses it"):
        CompressedTensors().load(folder, CPU, torch.float32)
    subject = Artifact(folder)
    session = subject.for_quality(CPU)
    assert session.engine == DECODED.name and "transformers refuses it" in subject.notes[0]
