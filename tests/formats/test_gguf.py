from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer

from oracles import llama_cpp
from oracles.memory_source import MemorySource, plans_of, store
from quantkit.errors import ModelError
from quantkit.formats.gguf import GGUF
from quantkit.formats.gguf_metadata import model_name
from quantkit.formats.gguf_parity import CHECK_TEXTS
from quantkit.formats.gguf_vocabulary import tokenizer_metadata
from quantkit.maths.ggml import encode
from quantkit.methods.ggml import GGML
from quantkit.methods.rtn import RTN
from quantkit.model.gguf_rope import rope_parameters
from quantkit.model.gguf_source import GGUFSource
from quantkit.tensors import BlockTensor

TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


def _model(folder: Path, tokenizer_from: Path, kind: str, **changes: object) -> Path:
    """A tiny random model of another family, with the tokenizer of the tiny Llama."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, object] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=384)
    settings |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    settings |= dict(bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes)))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.08)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


def _logits(source: MemorySource | GGUFSource, ids: list[int]) -> torch.Tensor:
    """Logits of transformers after the last token: float32 [vocabulary]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in source.config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(source.config["model_type"], **settings), dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict({n: source.read(n).float() for n in source.names()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("type_name", TYPES)
def test_what_is_written_is_read_back(tiny_llama: Path, tmp_path: Path, type_name: str) -> None:
    source = MemorySource(tiny_llama)
    method = GGML(type=type_name, embedding_type="q8_0")  # type: ignore[arg-type]
    paths, stored = store(source, GGUF(), tmp_path / "out", method, torch.float16)
    assert [path.name for path in paths] == [f"tiny-llama-{type_name.upper()}.gguf"]
    artifact = GGUF.open(tmp_path / "out")
    assert sorted(artifact.names()) == sorted(source.names())
    for name in source.names():
        weight = source.read(name)
        assert artifact.stored_bytes(name) == stored[name]
        assert artifact.shape(name) == tuple(weight.shape)
        quantized = artifact.quantized(name)
        if name == "model.embed_tokens.weight":
            assert isinstance(quantized, BlockTensor)
            assert torch.equal(quantized.data, encode(weight.half(), "Q8_0"))
        elif "proj" in name and type_name not in ("f16", "bf16"):
            assert isinstance(quantized, BlockTensor)
            assert quantized.type_name == type_name.upper()
            assert torch.equal(quantized.data, encode(weight, type_name.upper()))  # rows in the model's own order
            assert torch.equal(artifact.read(name), quantized.dequantize())
        elif "proj" in name:
            assert quantized is None
            assert torch.equal(
                artifact.read(name), weight.to({"f16": torch.half, "bf16": torch.bfloat16}[type_name]).float()
            )
        else:  # norms and the skipped head
            assert quantized is None
            assert torch.equal(artifact.read(name), weight.half().float())
    assert artifact.read("model.norm.weight").dtype == torch.float32


def test_the_file_is_what_gguf_py_reads(tiny_llama: Path, tmp_path: Path) -> None:
    (path,), _ = store(MemorySource(tiny_llama), GGUF(), tmp_path / "out", GGML(type="q4_0"), torch.float16)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == "Q4_0"
    assert types["output.weight"] == "F16"
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert list(tensors)[0] == "token_embd.weight"
    weight = MemorySource(tiny_llama).read("model.layers.0.self_attn.k_proj.weight")
    permuted = weight.reshape(2, 2, 8, 64).transpose(1, 2).reshape(32, 64)  # 2 heads of 16
    assert (tensors["blk.0.attn_k.weight"].data == encode(permuted, "Q4_0").numpy()).all()
    values = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 384,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: values[key] for key in expected} == expected
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert values["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert len(values["tokenizer.ggml.tokens"]) == 384
    assert "<|im_start|>" in values["tokenizer.chat_template"]


def test_a_tied_head_is_not_stored_and_files_repeat(tiny_llama_tied: Path, tmp_path: Path) -> None:
    source = MemorySource(tiny_llama_tied)
    (one,), _ = store(source, GGUF(), tmp_path / "one", GGML(type="q8_0"), torch.float16)
    (two,), _ = store(source, GGUF(), tmp_path / "two", GGML(type="q8_0"), torch.float16)
    assert one.read_bytes() == two.read_bytes()
    artifact = GGUF.open(one)
    assert artifact.tied_head
    assert "lm_head.weight" not in artifact.names()


def test_a_head_that_is_not_skipped_has_the_type_of_its_method(tiny_llama: Path, tmp_path: Path) -> None:
    method = GGML(type="q5_1", embedding_type="f16")
    store(MemorySource(tiny_llama), GGUF(), tmp_path / "out", method, torch.float16, head=method)
    artifact = GGUF.open(tmp_path / "out")
    head = artifact.quantized("lm_head.weight")
    assert isinstance(head, BlockTensor)
    assert head.type_name == "Q5_1"
    assert artifact.quantized("model.embed_tokens.weight") is None


def test_a_gguf_source_is_written_again(tiny_llama: Path, tmp_path: Path) -> None:
    (first,), _ = store(MemorySource(tiny_llama), GGUF(), tmp_path / "one", GGML(type="f16"), torch.float16)
    source = GGUFSource(first)
    (second,), _ = store(source, GGUF(), tmp_path / "two", GGML(type="q4_0"), torch.float16)
    assert second.name == "tiny-llama-Q4_0.gguf"
    artifact = GGUF.open(second)
    same = ("hidden_size", "rope_parameters", "vocab_size", "bos_token_id", "eos_token_id")
    assert {key: artifact.config[key] for key in same} == {key: source.config[key] for key in same}
    name = "model.layers.1.self_attn.q_proj.weight"
    quantized = artifact.quantized(name)
    assert isinstance(quantized, BlockTensor)
    assert torch.equal(quantized.data, encode(source.read(name), "Q4_0"))


@pytest.mark.parametrize(("kind", "architecture"), [("qwen2", "qwen2"), ("qwen3", "qwen3"), ("mistral", "llama")])
def test_other_families_keep_their_logits(tiny_llama: Path, tmp_path: Path, kind: str, architecture: str) -> None:
    source = MemorySource(
        _model(tmp_path / kind, tiny_llama, kind, head_dim=32)
        if kind == "qwen3"
        else _model(tmp_path / kind, tiny_llama, kind)
    )
    if kind == "qwen2":
        assert "model.layers.0.self_attn.q_proj.bias" in source.names()
    (path,), _ = store(source, GGUF(), tmp_path / "out", GGML(type="f16", embedding_type="f16"), torch.float32)
    artifact = GGUF.open(path)
    assert isinstance(artifact, GGUFSource)
    assert artifact.file.metadata["general.architecture"] == architecture
    assert sorted(artifact.names()) == sorted(source.names())
    ids = [5, 300, 17, 42, 99, 7]
    torch.testing.assert_close(_logits(artifact, ids), _logits(source, ids), rtol=0, atol=0.02)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["llama", "llama3", "yarn", "bias", "qwen2", "qwen3", "mistral"])
def test_llama_cpp_computes_the_same(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    changes: dict[str, object] = {}
    if kind == "llama3":
        changes = dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            )
        )
    if kind == "yarn":
        changes = dict(
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
        )
    if kind == "bias":
        changes = dict(attention_bias=True)
    if kind == "qwen3":
        changes = dict(head_dim=32)
    family = kind if kind in ("qwen2", "qwen3", "mistral") else "llama"
    source = MemorySource(_model(tmp_path / kind, tiny_llama, family, **changes))
    (path,), _ = store(source, GGUF(), tmp_path / "out", GGML(type="f16", embedding_type="f16"), torch.float32)
    ids = [5, 300, 17, 42, 99, 7, 201, 12, 64, 3, 350, 8]
    expected = _logits(source, ids)
    with llama_cpp.Model(path) as model:
        found = torch.from_numpy(model.last_logits(ids))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert expected.std() > 0.3  # so that the tolerance means something
    assert rope_parameters(GGUF.open(path).config)["rope_type"] == rope_parameters(source.config)["rope_type"]


@pytest.mark.engine
def test_llama_cpp_gives_the_ids_of_the_source(tiny_llama: Path, tmp_path: Path) -> None:
    (path,), _ = store(MemorySource(tiny_llama), GGUF(), tmp_path / "out", GGML(type="q8_0"), torch.float16)
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    with llama_cpp.Model(path) as model:
        for text in (*CHECK_TEXTS, "<|im_start|>user\nhi<|im_end|>\n", "", " "):
            assert model.tokenize(text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_a_sentencepiece_tokenizer_survives(shared_data: Path, tmp_path: Path, name: str) -> None:
    folder = shared_data / "models" / name
    source = MemorySource(folder)
    (path,), _ = store(source, GGUF(), tmp_path / "out", GGML(type="f16", embedding_type="f16"), torch.float16)
    artifact = GGUF.open(path)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made = Tokenizer.from_file(str(artifact.tokenizer_folder() / "tokenizer.json"))
    for text in (*CHECK_TEXTS, "<s>a</s> b", ""):
        assert made.encode(text).ids == original.encode(text).ids
    # and once more from the file that was made: the tokenizer.model it now has says the same
    rows = source.shape("model.embed_tokens.weight")[0]
    again = tokenizer_metadata(artifact.tokenizer_folder(), artifact.config, rows)
    first = tokenizer_metadata(folder, source.config, rows)
    assert again == first


def _edited_tokenizer(tiny_llama: Path, folder: Path, **changes: object) -> Path:
    folder.mkdir()
    spec = json.loads((tiny_llama / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | changes))
    return folder


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    spec = json.loads((tiny_llama / "tokenizer.json").read_text())
    cut = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, spec["pre_tokenizer"]],
    }
    with pytest.raises(ModelError, match="how it cuts text is none of gpt-2, smollm") as caught:
        tokenizer_metadata(_edited_tokenizer(tiny_llama, tmp_path / "cut", pre_tokenizer=cut), config, 384)
    assert "Punctuation" in caught.value.message
    with pytest.raises(ModelError, match="how it cuts text is none of"):
        lower = _edited_tokenizer(tiny_llama, tmp_path / "lower", normalizer={"type": "Lowercase"})
        tokenizer_metadata(lower, config, 384)
    with pytest.raises(ModelError, match="beyond the 300 rows of the embedding"):
        tokenizer_metadata(tiny_llama, config, 300)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        tokenizer_metadata(tmp_path, config, 384)


def test_ids_without_a_token_are_filled(tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    values = tokenizer_metadata(tiny_llama, config, 400)
    assert len(values["tokenizer.ggml.tokens"]) == len(values["tokenizer.ggml.token_type"]) == 400
    assert values["tokenizer.ggml.tokens"][399] == "[PAD399]"
    assert values["tokenizer.ggml.token_type"][399] == 5


def test_misfits_name_every_reason(tiny_llama: Path) -> None:
    source = MemorySource(tiny_llama)
    assert GGUF().misfits(plans_of(source, GGML()), source) == []
    problems = GGUF().misfits(plans_of(source, RTN(group_size=32)), source)
    assert len(problems) == 14
    assert problems[0].endswith("method rtn cannot be stored in GGUF; expected ggml")
    plans = plans_of(source, GGML())
    mixed = [*plans_of(source, GGML(embedding_type="q8_0"))[:-2], *plans_of(source, GGML(embedding_type="f16"))[-2:]]
    assert GGUF().misfits(mixed, source) == [
        "method.embedding_type: overrides ask for f16 and q8_0; a file has one embedding"
    ]
    source.config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 10000.0}
    assert "rope_type: longrope cannot be written" in GGUF().misfits(plans, source)[0]


def test_recognizes_only_gguf_files(tiny_llama: Path, tmp_path: Path) -> None:
    (path,), _ = store(MemorySource(tiny_llama), GGUF(), tmp_path / "out", GGML(type="q8_0"), torch.float16)
    assert GGUF.recognizes(path)
    assert GGUF.recognizes(path.parent)
    assert not GGUF.recognizes(tiny_llama)
    assert not GGUF.recognizes(tmp_path / "nothing")
    shutil.copy(path, path.with_name("second.gguf"))
    assert not GGUF.recognizes(path.parent)
    with pytest.raises(ModelError, match="a folder with exactly one"):
        GGUF.open(path.parent)
    (tmp_path / "fake.gguf").write_bytes(b"nothing at all")
    assert not GGUF.recognizes(tmp_path / "fake.gguf")


def test_name_and_licence_come_from_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--someone--nice-model" / "snapshots" / "0123abc"
    shutil.copytree(tiny_llama, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Nice\n")
    (path,), _ = store(MemorySource(folder), GGUF(), tmp_path / "out", GGML(type="q4_1"), torch.float16)
    assert path.name == "nice-model-Q4_1.gguf"
    source = GGUFSource(path)
    values = source.file.metadata
    assert (values["general.name"], values["general.license"]) == ("nice-model", "apache-2.0")
    (again,), _ = store(source, GGUF(), tmp_path / "again", GGML(type="q8_0"), torch.float16)
    kept = GGUFSource(again).file.metadata
    assert (again.name, kept["general.license"]) == ("nice-model-Q8_0.gguf", "apache-2.0")


def test_a_damaged_sentencepiece_model_is_told(tmp_path: Path) -> None:
    from tokenizers import models, normalizers

    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ModelError, match=r"tokenizer\.model: is damaged"):
        tokenizer_metadata(tmp_path, {}, 3)


@pytest.mark.parametrize(
    "name",
    ["Tiny-1.5-Q4_K_M.gguf", "Tiny-1.5.IQ4_XS.gguf", "Tiny-1.5_f16.gguf", "Tiny-1.5-q4_0.gguf", "Tiny-1.5.gguf"],
)
def test_a_files_name_without_its_type_is_the_models(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    (first,), _ = store(MemorySource(tiny_llama), GGUF(), tmp_path / "one", GGML(type="q4_0"), torch.float16)
    assert model_name(GGUFSource(first.rename(tmp_path / name))) == "Tiny-1.5"
