"""The bitsandbytes format against transformers: the same words in the file, the same logits from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import write_tiny_llama
from oracles.memory_source import MemorySource, plans_of, store
from quantkit.errors import ModelError
from quantkit.formats import open_artifact
from quantkit.formats.base import ArtifactSource, LinearPlan
from quantkit.formats.bitsandbytes import BitsAndBytes, BitsAndBytesArtifact, pack_nf4
from quantkit.methods.int8 import INT8
from quantkit.methods.nf4 import NF4, quantize_nf4
from quantkit.methods.rtn import RTN
from quantkit.tensors import CodebookBlocks, Int8Rows

METHODS = {"int8": INT8(), "nf4": NF4(double_quant=False), "nf4-double": NF4()}
IDS = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(1))
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def half_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in float16, as most checkpoints are stored."""
    return in_half(write_tiny_llama(tmp_path_factory.mktemp("half") / "tiny"))


@pytest.fixture(scope="module")
def half_llama_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_half(write_tiny_llama(tmp_path_factory.mktemp("half") / "tiny-tied", tied=True))


def in_half(folder: Path) -> Path:
    weights = folder / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def load(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def settings_of_transformers(method: INT8 | NF4) -> Any:
    from transformers import BitsAndBytesConfig

    if isinstance(method, INT8):
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=method.double_quant,
        bnb_4bit_compute_dtype=method.compute_dtype,
    )


def decoded_model(artifact: ArtifactSource) -> Any:
    """A plain float32 model of an artifact's decoded weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**artifact.config)).float()
    weights = {name: artifact.read(name).float() for name in artifact.names()}
    if artifact.tied_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tied", [False, True])
def test_words_and_logits_are_those_of_transformers(
    half_llama: Path, half_llama_tied: Path, tmp_path: Path, name: str, tied: bool
) -> None:
    method, folder = METHODS[name], half_llama_tied if tied else half_llama
    source = MemorySource(folder)
    _, stored = store(source, BitsAndBytes(), tmp_path / "ours", method, torch.float16)
    theirs = load(folder, quantization_config=settings_of_transformers(method), dtype=torch.float16)
    theirs.save_pretrained(tmp_path / "theirs")  # before any forward pass
    our_words = load_file(tmp_path / "ours" / "model.safetensors")
    their_words = load_file(tmp_path / "theirs" / "model.safetensors")
    assert our_words.keys() == their_words.keys()
    for key, tensor in their_words.items():
        assert our_words[key].dtype == tensor.dtype, key
        if key.endswith("bitsandbytes__nf4"):  # a text, which ours fills up to one length with blanks
            assert bytes(our_words[key].tolist()).rstrip() == bytes(tensor.tolist()), key
        else:
            assert torch.equal(our_words[key], tensor), key

    ours = load(tmp_path / "ours")
    assert ours.dtype == torch.float16
    first = logits(ours)
    assert torch.equal(first, logits(theirs))
    assert torch.equal(first, logits(load(tmp_path / "ours")))

    artifact = open_artifact(tmp_path / "ours")
    assert isinstance(artifact, BitsAndBytesArtifact)
    assert set(artifact.names()) == set(source.names())
    assert all(artifact.stored_bytes(key) == stored[key] for key in artifact.names())
    assert all(artifact.shape(key) == source.shape(key) for key in artifact.names())
    difference = (first - logits(decoded_model(artifact))).abs().max()
    # int8 quantizes activations as well; nf4 rounds to float16, or to bfloat16 where the processor computes in it
    assert float(difference) < (0.15 if name == "int8" else 0.06)


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_logits_of_decoded_weights_are_those_of_the_reader(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if has_avx512bf16():
        pytest.skip("bitsandbytes computes 4-bit linears in bfloat16 on this processor, whatever compute_dtype says")
    method = METHODS[name].model_copy(update={"compute_dtype": "float32"})
    store(MemorySource(tiny_llama), BitsAndBytes(), tmp_path / "out", method, torch.float32)
    assert torch.equal(logits(load(tmp_path / "out")), logits(decoded_model(open_artifact(tmp_path / "out"))))


@pytest.mark.parametrize("name", METHODS)
def test_quantized_tensors_come_back(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    source = MemorySource(tiny_llama)
    store(source, BitsAndBytes(), tmp_path / "out", method, torch.bfloat16)
    artifact = open_artifact(tmp_path / "out")
    weight = source.read(f"{DOWN}.weight")
    found = artifact.quantized(f"{DOWN}.weight")
    if isinstance(method, INT8):
        from quantkit.methods.int8 import quantize_rows

        expected = quantize_rows(weight.half())
        assert isinstance(found, Int8Rows)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.absmax, expected.absmax)
    else:
        made = quantize_nf4(weight, 64, method.double_quant)
        assert isinstance(found, CodebookBlocks)
        assert found.dtype == torch.bfloat16  # what the reader decodes to: the dtype of the artifact
        assert torch.equal(found.packed, made.packed) and torch.equal(found.absmax, made.absmax)
        assert found.nested_offset == made.nested_offset
        assert torch.equal(found.dequantize(), made.dequantize())
    assert artifact.quantized("model.norm.weight") is None
    assert artifact.quantized("lm_head.weight") is None
    assert artifact.read("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("method", [INT8(threshold=4), NF4(compute_dtype="bfloat16")])
def test_skipped_linears_stay_and_the_config_names_them(half_llama: Path, tmp_path: Path, method: INT8 | NF4) -> None:
    source = MemorySource(half_llama)
    skipped = "model.layers.1.mlp.up_proj"
    plans = [
        LinearPlan(plan.name, plan.out_features, plan.in_features, None if plan.name == skipped else plan.method)
        for plan in plans_of(source, method)
    ]
    (tmp_path / "out").mkdir()
    writer = BitsAndBytes().writer(tmp_path / "out", source, plans, torch.float16)
    methods = {f"{plan.name}.weight": plan.method for plan in plans if plan.method is not None}
    for name in source.names():
        value: Any = source.read(name)
        if name in methods:
            from quantkit.methods.int8 import quantize_rows

            value = quantize_rows(value) if isinstance(method, INT8) else quantize_nf4(value, 64, True)
        writer.add(name, value)
    writer.finish()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == [skipped, "lm_head"]
    model = load(tmp_path / "out")
    kind = "Linear8bitLt" if isinstance(method, INT8) else "Linear4bit"
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    assert quantized == {name.removesuffix(".weight") for name in methods}
    assert type(model.get_submodule(skipped)) is torch.nn.Linear
    if isinstance(method, INT8):
        assert model.get_submodule(DOWN).state.threshold == 4.0
    else:
        assert model.get_submodule(DOWN).compute_dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()


def test_a_quantized_head_is_loaded_as_one(half_llama: Path, tmp_path: Path) -> None:
    source = MemorySource(half_llama)
    store(source, BitsAndBytes(), tmp_path / "out", NF4(), torch.float16, head=NF4())
    model = load(tmp_path / "out")
    assert type(model.lm_head).__name__ == "Linear4bit"
    artifact = open_artifact(tmp_path / "out")
    assert isinstance(artifact.quantized("lm_head.weight"), CodebookBlocks)
    assert float((logits(model) - logits(decoded_model(artifact))).abs().max()) < 0.06


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_use_double_quant": True},
    ],
)
def test_artifacts_of_transformers_are_read(half_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    model = load(half_llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **changes), dtype=torch.float16)
    model.save_pretrained(tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    weight = model.get_submodule(DOWN).weight
    assert torch.equal(artifact.read(f"{DOWN}.weight").half(), dequantize_4bit(weight.data, weight.quant_state))
    assert artifact.shape(f"{DOWN}.weight") == (64, 128)


def test_misfits(half_llama: Path) -> None:
    source = MemorySource(half_llama)
    plans = plans_of(source, NF4())
    assert BitsAndBytes().misfits(plans, source) == []
    other = [LinearPlan(DOWN, 64, 128, NF4(double_quant=False))]
    (line,) = BitsAndBytes().misfits([*plans[:2], *other], source)
    assert line.startswith(f"{DOWN}: ") and "double_quant=False" in line and plans[0].name in line
    (line,) = BitsAndBytes().misfits([*plans[:2], LinearPlan(DOWN, 64, 128, RTN())], source)
    assert line == f"{DOWN}: method rtn cannot be stored for bitsandbytes; expected int8 or nf4"


def test_recognizes_its_own_only(half_llama: Path, tmp_path: Path) -> None:
    store(MemorySource(half_llama), BitsAndBytes(), tmp_path / "out", INT8(), torch.float16)
    assert BitsAndBytes.recognizes(tmp_path / "out")
    assert not BitsAndBytes.recognizes(half_llama)
    assert not BitsAndBytes.recognizes(tmp_path)


def test_nf4_beyond_the_dtype_of_the_artifact_is_refused() -> None:
    weight = torch.ones(2, 64)
    weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"up\.weight: values up to 1e\+05 do not fit float16"):
        pack_nf4("up.weight", quantize_nf4(weight, 64, False), torch.float16)
    assert pack_nf4("up.weight", quantize_nf4(weight, 64, False), torch.bfloat16)


STATE = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"


def text(**changes: Any) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 128]}
    return torch.tensor(list(json.dumps({**state, **changes}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (STATE, torch.tensor([1, 2, 3], dtype=torch.uint8), "not the JSON of a quantized weight"),
        (STATE, text(blocksize=0), "expected blocksize, dtype and shape"),
        (STATE, text(shape=[64, 128, 1]), "expected blocksize, dtype and shape"),
        (STATE, text(dtype="__doc__"), "expected blocksize, dtype and shape"),
        (STATE, text(shape=[64, 127]), r"U8 \[4096, 1\], expected U8 \[4064, 1\]"),
        (f"{DOWN}.weight.absmax", torch.zeros(3), r"absmax: found F32 \[3\], expected F32 \[128\]"),
        (f"{DOWN}.weight.quant_map", None, r"quant_map: missing, expected F32 \[16\]"),
    ],
)
def test_damaged_nf4(half_llama: Path, tmp_path: Path, name: str, value: Tensor | None, message: str) -> None:
    store(MemorySource(half_llama), BitsAndBytes(), tmp_path / "out", METHODS["nf4"], torch.float16)
    damage(tmp_path / "out", name, value)
    with pytest.raises(ModelError, match=message):
        open_artifact(tmp_path / "out").read(f"{DOWN}.weight")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{DOWN}.SCB", torch.zeros(5), r"SCB: found F32 \[5\], expected F32 \[64\]"),
        (f"{DOWN}.weight", torch.zeros(64, 128), r"weight: found F32 \[64, 128\], expected I8"),
        (f"{DOWN}.weight", torch.zeros(64, dtype=torch.int8), r"shape \[64\], expected \[out, in\]"),
        (f"{DOWN}.weight_format", torch.tensor(2, dtype=torch.uint8), "layout 2, expected 0"),
    ],
)
def test_damaged_int8(half_llama: Path, tmp_path: Path, name: str, value: Tensor, message: str) -> None:
    store(MemorySource(half_llama), BitsAndBytes(), tmp_path / "out", INT8(), torch.float16)
    damage(tmp_path / "out", name, value)
    with pytest.raises(ModelError, match=message):
        open_artifact(tmp_path / "out").read(f"{DOWN}.weight")


def damage(folder: Path, name: str, value: Tensor | None) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, weights, metadata={"format": "pt"})
