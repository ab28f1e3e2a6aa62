"""Models built from sources: the same as transformers' own loader builds, or an error that names every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from oracles.memory_source import MemorySource, store
from quantkit.errors import ModelError
from quantkit.formats import open_artifact
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML
from quantkit.model.blocks import blocks_of
from quantkit.model.load import load_transformers, without_weights
from quantkit.model.reader import open_source

IDS = torch.tensor([[5, 17, 200, 383, 9, 64]])


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_llama_tied"])
def test_a_folder_gives_the_model_that_transformers_loads(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    ours = load_transformers(open_source(str(folder)), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(expected)
    for name, parameter in [*ours.named_parameters(), *ours.named_buffers()]:
        assert parameter.device.type == "cpu", name
    for name, buffer in theirs.named_buffers():
        assert torch.equal(dict(ours.named_buffers())[name], buffer), name
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    tied = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert tied is (kind == "tiny_llama_tied")
    assert not ours.training


class _Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that was made off the meta device."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            self.largest = max(self.largest, made.nbytes)
        return made


def test_a_model_without_weights_never_had_any(tiny_llama: Path) -> None:
    """Weights that are made and moved leave gaps of their size in the heap, into which later tensors are spread."""
    source = MemorySource(tiny_llama)
    smallest = min(source.read(f"{linear}.weight").nbytes for block in blocks_of(source) for linear in block.linears)
    with _Allocations() as seen:
        model = without_weights(source, torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert 0 < seen.largest < smallest


def test_weights_get_the_dtype_that_is_asked_for(tiny_llama: Path) -> None:
    model = load_transformers(open_source(str(tiny_llama)), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_gguf_artifact_runs_with_its_decoded_weights(tiny_llama_tied: Path, tmp_path: Path) -> None:
    store(MemorySource(tiny_llama_tied), GGUF(), tmp_path / "q", GGML(type="q8_0"), torch.float16)
    artifact = open_artifact(tmp_path / "q")
    model = load_transformers(artifact, torch.float32)
    loaded = dict(model.named_parameters())
    for name in artifact.names():
        assert torch.equal(loaded[name], artifact.read(name).float()), name
    by_hand = AutoModelForCausalLM.from_pretrained(tiny_llama_tied, dtype=torch.float32)
    state = {name: artifact.read(name) for name in artifact.names()}
    by_hand.load_state_dict(state, strict=False)
    with torch.inference_mode():
        assert torch.allclose(model(IDS).logits, by_hand(IDS).logits, atol=1e-5)


def test_missing_unknown_and_misshapen_tensors_are_all_named(tiny_llama: Path) -> None:
    source = MemorySource(tiny_llama)
    gone, odd = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    del source.tensors[gone]
    source.tensors[odd] = torch.ones(65)
    source.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    with pytest.raises(ModelError) as raised:
        load_transformers(source, torch.float32)
    message = raised.value.message
    assert gone in message and "q_proj.bias" in message
    assert f"{odd} ([65] stored, [64] expected)" in message


def test_a_stored_rotary_table_is_not_an_unknown_tensor(tiny_llama: Path) -> None:
    source = MemorySource(tiny_llama)
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert load_transformers(source, torch.float32) is not None


def test_a_config_that_is_no_model_is_refused(tiny_llama: Path) -> None:
    source = MemorySource(tiny_llama)
    source.config["model_type"] = "nothing-like-it"
    with pytest.raises(ModelError, match=r"config\.json.*nothing-like-it"):
        load_transformers(source, torch.float32)
