"""llama.cpp through its C interface: the layout is guarded, and its logits are those of the decoded weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from oracles.memory_source import MemorySource, store
from quantkit.engines import DECODED, llama_api, llama_cpp
from quantkit.engines.llama_api import VERSION, ModelParams, differences
from quantkit.engines.llama_cpp import LlamaCpp, repacks
from quantkit.errors import MissingDependencyError, ModelError
from quantkit.formats.gguf import GGUF
from quantkit.methods.ggml import GGML

CPU = torch.device("cpu")
needs_llama = pytest.mark.skipif(llama_api.installed() != VERSION, reason=f"xllamacpp {VERSION} is not installed")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """llama.cpp's threads wait for each other at every operation, which takes long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_layout_is_that_of_the_header() -> None:
    # offsets of a C compiler for include/llama.h of the pinned build on a 64-bit machine
    assert ModelParams.n_gpu_layers.offset == 16 and ModelParams.use_extra_bufts.offset == 74
    assert llama_api.ContextParams.offload_kqv.offset == 137 and llama_api.ContextParams.samplers.offset == 144
    assert llama_api.Batch.logits.offset == 48


def test_other_defaults_than_the_known_ones_are_told() -> None:
    made = ModelParams(n_gpu_layers=-1, split_mode=1, load_mode=-1, lazy_mode=1, use_extra_bufts=True)
    assert differences(made, llama_api.MODEL_DEFAULTS) == []
    made.split_mode, made.check_tensors = 7, True
    assert differences(made, llama_api.MODEL_DEFAULTS) == [
        "ModelParams.split_mode is 7, expected 1",
        "ModelParams.check_tensors is True, expected 0",
    ]


def test_an_absent_or_other_version_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, "2020.1.1"):
        monkeypatch.setattr(llama_api, "installed", lambda found=found: found)
        monkeypatch.setattr("quantkit.engines.llama_cpp.installed", lambda found=found: found)
        assert f"pip install xllamacpp=={VERSION}" in str(LlamaCpp().available())
        llama_api.library.cache_clear()
        with pytest.raises(MissingDependencyError, match=VERSION):
            llama_api.library()
    llama_api.library.cache_clear()


def _artifact(model: Path, folder: Path, type_name: str) -> Path:
    store(MemorySource(model), GGUF(), folder, GGML(type=type_name, embedding_type=type_name), torch.float16)  # type: ignore[arg-type]
    return folder


@needs_llama
@pytest.mark.engine
@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_0"])
def test_logits_are_those_of_the_decoded_weights(type_name: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = _artifact(tiny_llama, tmp_path / type_name, type_name)
    session = LlamaCpp().load(path, CPU, torch.float32)
    ids = torch.randint(384, (40,), generator=torch.Generator().manual_seed(1))
    logits = session.logits(ids)
    expected = DECODED.load(path, CPU, torch.float32).logits(ids)
    assert logits.shape == expected.shape == (40, 384)
    # half-precision cache and activations; with quantized weights activations in 8 bits: about 1% of a block's largest
    noise = (logits - expected).norm() / expected.norm()
    assert noise < (0.002 if type_name == "f16" else 0.03)
    session.close()


@needs_llama
@pytest.mark.engine
def test_a_window_of_many_steps_is_one_sequence(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _artifact(tiny_llama, tmp_path / "f16", "f16")
    ids = torch.randint(384, (100,), generator=torch.Generator().manual_seed(2))
    expected = DECODED.load(path, CPU, torch.float32).logits(ids)
    monkeypatch.setattr(llama_cpp, "UBATCH", 16)
    session = LlamaCpp().load(path, CPU, torch.float32)
    for last in (None, 1, 16, 37, 100):
        logits = session.logits(ids, last)
        assert logits.shape == (last or 100, 384)
        assert (logits - expected[-len(logits) :]).norm() < 0.002 * expected[-len(logits) :].norm()
    # the cache is cleared between windows
    assert torch.equal(session.logits(ids[50:], 3), LlamaCpp().load(path, CPU, torch.float32).logits(ids[50:], 3))
    session.close()


@needs_llama
@pytest.mark.engine
def test_a_sequence_grows_as_far_as_was_said(tiny_llama: Path, tmp_path: Path) -> None:
    session = LlamaCpp().load(_artifact(tiny_llama, tmp_path / "f16", "f16"), CPU, torch.float32)
    tokens = session.prefill(torch.full((1, 240), 7), room=20)  # 256 places would be too few
    for _ in range(20):
        tokens = session.decode(tokens)
    assert 0 <= int(tokens) < 384
    session.close()


def test_only_builds_for_amx_leave_weights_as_they_are() -> None:
    assert repacks(b"CPU : SSE3 = 1 | AVX2 = 1 | AVX512_VNNI = 1 | REPACK = 1 | ")
    assert not repacks(b"CPU : SSE3 = 1 | AVX2 = 1 | AVX512_VNNI = 1 | AMX_INT8 = 1 | REPACK = 1 | ")


@needs_llama
@pytest.mark.engine
def test_the_way_around_the_amx_crash_is_a_condition_of_the_measurement(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _artifact(tiny_llama, tmp_path / "q8", "q8_0")
    assert LlamaCpp().load(path, CPU, torch.float32).details["repacking"] is True
    asked: list[bool] = []
    call = llama_api.library().call
    load = call.llama_model_load_from_file

    def noted(name: bytes, params: ModelParams) -> object:
        asked.append(params.use_extra_bufts)
        return load(name, params)

    monkeypatch.setattr(call, "llama_print_system_info", lambda: b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ")
    monkeypatch.setattr(call, "llama_model_load_from_file", noted)
    session = LlamaCpp().load(path, CPU, torch.float32)
    assert session.details["repacking"] == "off: crashes with AMX" and asked == [False]
    assert session.details["threads"] == torch.get_num_threads()
    assert session.logits(torch.tensor([1, 2, 3])).isfinite().all()
    session.close()


@needs_llama
@pytest.mark.engine
def test_prefill_and_decode_agree_with_logits(tiny_llama: Path, tmp_path: Path) -> None:
    session = LlamaCpp().load(_artifact(tiny_llama, tmp_path / "f16", "f16"), CPU, torch.float32)
    prompts = torch.tensor([[5, 17, 200, 383], [9, 64, 31, 77]])
    first = session.prefill(prompts)
    second = session.decode(first)
    third = session.decode(second)
    for row in range(2):
        whole = torch.cat([prompts[row], first[row : row + 1], second[row : row + 1]])
        likeliest = session.logits(whole).argmax(-1)
        assert likeliest[3:].tolist() == [first[row], second[row], third[row]]
    assert torch.equal(session.prefill(prompts), first)
    session.close()


@needs_llama
@pytest.mark.engine
def test_a_damaged_file_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match="llama.cpp refuses it"):
        LlamaCpp().load(tmp_path, CPU, torch.float32)
